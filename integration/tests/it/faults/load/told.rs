//! Readers whose files are gone for good: they are told, and others take their places.

use std::collections::BTreeSet;
use std::mem;
use std::sync::PoisonError;

use anyhow::Context as _;
use skimmer_integration::command::wait_for;
use skimmer_integration::skimmerd::MountMode;

use super::{Load, PROGRESS, WAYS, own};
use crate::faults::reader::{Reader, Way, only_errors};

impl Load {
    /// Lets images come and go no more: their readers may have been told of errors, but found no other bytes, and nobody
    /// was left waiting.
    pub fn pause_told(&mut self) -> anyhow::Result<()> {
        self.pause()?;
        let mut failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        for failure in mem::take(&mut *failures) {
            only_errors(&failure)?;
            anyhow::ensure!(!failure.contains("in vain"), "not told: {failure}");
        }
        Ok(())
    }

    /// Which of those that read all along were told; the others go on.
    pub fn told(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut told = BTreeSet::new();
        for reader in &self.steady {
            let before = reader.rounds();
            let is_told = wait_for("a reader goes on or is told", PROGRESS, || {
                // What it has by then said of a whole round.
                let is_past = reader.rounds() >= before + 2;
                let told = reader.was_told(&self.hands.ctr);
                (is_past || !matches!(told, Ok(false))).then_some(told)
            })??;
            if is_told {
                told.insert(reader.id().to_owned());
            }
        }
        Ok(told)
    }

    /// Begins anew in place of those that were told.
    pub fn replace(&mut self, told: &BTreeSet<String>) -> anyhow::Result<()> {
        self.release()?;
        let places = self.steady.iter_mut().zip(self.images.steady.iter().zip(WAYS));
        for (reader, (known, (id, way))) in places.filter(|(reader, _)| told.contains(reader.id()))
        {
            self.hands.remove_container(reader.id());
            // What is complete by now may be the kernel's.
            let way = if MountMode::of_this_run() == MountMode::Auto { Way::Cached } else { way };
            *reader = Reader::start(
                &self.hands.ctr,
                known,
                &own(&format!("{id}-again")),
                way,
                &self.hands.folder,
            )
            .context("begin anew")?;
            reader.go()?;
        }
        self.begin_forgetting()
    }
}
