//! A file in memory that outlives the process which writes it.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{Error, Keeper, Kept};

/// The file that is kept under `name`: an earlier process's, taken out of `kept`, or a new one.
pub fn open(keeper: &Arc<dyn Keeper>, kept: &mut Vec<Kept>, name: &str) -> Result<File, Error> {
    if let Some(at) = kept.iter().position(|kept| kept.name == name) {
        return Ok(kept.swap_remove(at).fd.into());
    }
    let memory = memfd_create("skimmer", MFdFlags::MFD_CLOEXEC);
    let memory: File = memory.map_err(|source| Error::Memory { source })?.into();
    keeper.keep(name, memory.as_fd())?;
    Ok(memory)
}

/// Gives up what is kept under `name`, if anything is.
pub fn discard(keeper: &Arc<dyn Keeper>, kept: &mut Vec<Kept>, name: &str) -> Result<(), Error> {
    let before = kept.len();
    kept.retain(|kept| kept.name != name);
    if kept.len() < before { keeper.release(name) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{BorrowedFd, OwnedFd};
    use std::os::unix::fs::FileExt as _;
    use std::sync::Mutex;

    use super::*;
    use crate::Lasts;

    #[derive(Default)]
    struct Inside(Mutex<BTreeMap<String, OwnedFd>>);

    impl Keeper for Inside {
        fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
            self.0.lock().unwrap().insert(name.to_owned(), fd.try_clone_to_owned().unwrap());
            Ok(())
        }

        fn release(&self, name: &str) -> Result<(), Error> {
            self.0.lock().unwrap().remove(name);
            Ok(())
        }

        fn lasts(&self) -> Lasts {
            Lasts::Process
        }
    }

    #[test]
    fn a_file_is_found_again_until_it_is_discarded() {
        let inside = Arc::new(Inside::default());
        let keeper = Arc::clone(&inside) as Arc<dyn Keeper>;
        open(&keeper, &mut Vec::new(), "m").unwrap().write_all_at(b"here", 0).unwrap();
        let left = || -> Vec<Kept> {
            let kept = inside.0.lock().unwrap();
            let kept = kept.iter().map(|(name, fd)| (name.clone(), fd.try_clone().unwrap()));
            kept.map(|(name, fd)| Kept { name, fd }).collect()
        };
        let mut kept = left();
        let file = open(&keeper, &mut kept, "m").unwrap();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((&bytes, kept.len()), (b"here", 0));
        let mut kept = left();
        discard(&keeper, &mut kept, "other").unwrap();
        assert_eq!((kept.len(), left().len()), (1, 1));
        discard(&keeper, &mut kept, "m").unwrap();
        assert_eq!((kept.len(), left().len()), (0, 0));
    }
}
