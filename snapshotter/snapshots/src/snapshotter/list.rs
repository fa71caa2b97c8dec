//! Listing by filter, through the narrowest look-up.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use tokio::sync::mpsc;

use super::{Error, Inner, Snapshotter};
use crate::Snapshot;
use crate::filter::{Filter, Lookup};

/// Snapshots in one message of a listing.
const PAGE: usize = 100;
/// Pages that wait for a slow client.
const PAGES_AHEAD: usize = 2;

impl Snapshotter {
    /// The snapshots that match any of `filters` (all, if there is none), page by page. The listing
    /// ends with an error or when the receiver is dropped.
    pub fn list(
        &self,
        filters: &[String],
    ) -> Result<mpsc::Receiver<Result<Vec<Snapshot>, Error>>, Error> {
        let filters: Vec<Filter> =
            filters.iter().map(|text| Filter::parse(text)).collect::<Result<_, _>>()?;
        let (sender, receiver) = mpsc::channel(PAGES_AHEAD);
        let inner = self.0.clone();
        tokio::task::spawn_blocking(move || {
            let mut pages = Pages { sender, page: Vec::new() };
            match inner.find(&filters, &mut pages) {
                Ok(()) => pages.flush(),
                // The client is told; if it has gone, there is nobody to tell.
                Err(error) => drop(pages.sender.blocking_send(Err(error))),
            }
        });
        Ok(receiver)
    }
}

impl Inner {
    fn find(&self, filters: &[Filter], pages: &mut Pages) -> Result<(), Error> {
        let matches =
            |s: &Snapshot| filters.is_empty() || filters.iter().any(|filter| filter.matches(s));
        let Some(names) = self.candidates(filters)? else {
            self.records.visit(&mut |snapshot| match matches(&snapshot) {
                true => pages.push(snapshot),
                false => ControlFlow::Continue(()),
            })?;
            return Ok(());
        };
        for name in names {
            // What was removed since the look-up isn't listed.
            let found = self.records.get(&name)?.filter(|snapshot| matches(snapshot));
            if found.is_some_and(|snapshot| pages.push(snapshot).is_break()) {
                break;
            }
        }
        Ok(())
    }

    /// Names of all snapshots that can match, or `None` if every one can.
    fn candidates(&self, filters: &[Filter]) -> Result<Option<BTreeSet<String>>, Error> {
        let mut names = BTreeSet::new();
        for filter in filters {
            match filter.lookup() {
                Lookup::Everything => return Ok(None),
                Lookup::Name(name) => drop(names.insert(name)),
                Lookup::Children(parent) => names.extend(self.records.children(&parent)?),
                Lookup::Claim { reference, parent } => {
                    names.extend(self.records.claiming(&reference, &parent)?);
                }
            }
        }
        Ok(if filters.is_empty() { None } else { Some(names) })
    }
}

struct Pages {
    sender: mpsc::Sender<Result<Vec<Snapshot>, Error>>,
    page: Vec<Snapshot>,
}

impl Pages {
    fn push(&mut self, snapshot: Snapshot) -> ControlFlow<()> {
        self.page.push(snapshot);
        if self.page.len() < PAGE {
            return ControlFlow::Continue(());
        }
        match self.sender.blocking_send(Ok(std::mem::take(&mut self.page))) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_gone) => ControlFlow::Break(()),
        }
    }

    fn flush(mut self) {
        if !self.page.is_empty() {
            // A client that has gone needs no last page.
            drop(self.sender.blocking_send(Ok(std::mem::take(&mut self.page))));
        }
    }
}
