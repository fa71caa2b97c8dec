//! The image that operators want whole: pulled lazily, and then all of it put into containerd.

use skimmer_integration::ctr::Pull;

use super::Load;

impl Load {
    /// Pulls it; nothing of its files is here then.
    pub fn pull_whole_lazily(&self) -> anyhow::Result<()> {
        let (hands, known) = (&self.hands, &self.images.whole);
        hands.skimmer.import_indexes(&known.indexes)?;
        hands.ctr.pull(&Pull::new(&known.reference, "skimmer"))?;
        anyhow::ensure!(hands.is_unread(known)?, "something of it is here");
        Ok(())
    }

    /// Runs a container of it on containerd's own overlayfs.
    pub fn run_whole(&self) -> anyhow::Result<()> {
        self.hands.check_in_container(&self.images.whole, "overlayfs")
    }

    /// Removes it, and what is cached of it.
    pub fn forget_whole(&self) -> anyhow::Result<()> {
        // It may be there by its digest, too.
        let repository = self.images.whole.reference.trim_end_matches(":latest");
        let names = self.hands.ctr.images()?;
        let mut names = names.iter().filter(|name| name.starts_with(repository));
        names.try_for_each(|name| self.hands.remove_image(name))?;
        self.hands.skimmer.ask(&["cache", "prune"])?;
        Ok(())
    }
}
