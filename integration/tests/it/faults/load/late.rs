//! An image that somebody begins to read while something is wrong: it waits, or is served in spite of that.

use skimmer_integration::command::wait_for;
use skimmer_integration::ctr::{Pull, unique};

use super::{Hands, Indexes, Load, PASSING, PROGRESS, own};
use crate::faults::images::Known;
use crate::faults::reader::{Reader, Way};

/// It has been pulled, and nothing of it has been fetched.
pub struct Unread {
    hands: Hands,
    known: Known,
}

/// Its container, which reads.
pub struct Late {
    hands: Hands,
    known: Known,
    reader: Reader,
}

impl Load {
    /// Pulls it; where the node doesn't have all indexes, it might be fetched at once, so there is none.
    pub fn pull_unread(&self) -> anyhow::Result<Option<Unread>> {
        if self.hands.indexes != Indexes::Node {
            return Ok(None);
        }
        let (hands, known) = (self.hands.clone(), self.images.late.clone());
        wait_for("an image is here by name alone", PROGRESS, || {
            hands.skimmer.import_indexes(&known.indexes).ok()?;
            hands.ctr.pull(&Pull::new(&known.reference, "skimmer")).ok()?;
            let is_unread = hands.is_unread(&known).ok()?;
            if !is_unread {
                // Others have evicted the index in between, or not yet what was read the last time.
                hands.forget(&known).ok()?;
            }
            is_unread.then_some(())
        })?;
        Ok(Some(Unread { hands, known }))
    }
}

impl Unread {
    /// Runs a container that reads it.
    pub fn read(self) -> anyhow::Result<Late> {
        let Self { hands, known } = self;
        let id = own(&format!("{PASSING}{}", unique()));
        let reader = Reader::start(&hands.ctr, &known, &id, Way::Cached, &hands.folder)?;
        reader.go()?;
        Ok(Late { hands, known, reader })
    }
}

impl Late {
    /// Fails if it has read everything.
    pub fn ensure_waits(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.reader.rounds() == 0, "a late reader didn't have to wait");
        Ok(())
    }

    /// Waits until it has read everything, and removes it and the image.
    pub fn finish(self) -> anyhow::Result<()> {
        self.reader.wait_round(PROGRESS)?;
        self.hands.ctr.remove_container(self.reader.id())?;
        self.hands.forget(&self.known)
    }
}
