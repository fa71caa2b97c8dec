//! The holder and its client, over a real socket: what a dead process left is there for the next one.
#![expect(clippy::unwrap_used, reason = "a panic is how a test reports")]

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use skimmer_keeper::{Error, Holder, Keeper, Kept, Place, hold, open};

/// A holder in a thread of this process; it runs until the tests end.
fn holder(folder: &Path) -> PathBuf {
    let address = folder.join("run/hold.sock");
    let served = address.clone();
    std::thread::spawn(move || hold::serve(&served).unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !address.exists() {
        assert!(Instant::now() < deadline, "no holder");
        std::thread::sleep(Duration::from_millis(5));
    }
    address
}

fn connect(address: &Path) -> (std::sync::Arc<dyn Keeper>, Vec<Kept>) {
    open(&Place::Holder(address.to_owned())).unwrap().unwrap()
}

/// A pipe whose writing end can be kept: the reader sees its end when the last one who has it is gone.
fn pipe() -> (PipeReader, PipeWriter) {
    std::io::pipe().unwrap()
}

#[test]
fn what_a_process_left_is_there_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let address = holder(folder.path());
    assert_eq!(std::fs::metadata(&address).unwrap().permissions().mode() & 0o777, 0o600);
    let (mut reader, writer) = pipe();
    let (first, left) = connect(&address);
    assert!(left.is_empty());
    first.keep("fuse.1", writer.as_fd()).unwrap();
    first.keep("fuse.2", writer.as_fd()).unwrap();
    first.release("fuse.2").unwrap();
    first.release("never-kept").unwrap();
    drop((first, writer));

    let (second, left) = connect(&address);
    let [Kept { name, fd }] = <[Kept; 1]>::try_from(left).unwrap();
    assert_eq!(name, "fuse.1");
    File::from(fd).write_all(b"still open").unwrap();
    second.release("fuse.1").unwrap();
    drop(second);
    let mut text = String::new();
    // It ends, so that nobody has the other end any more.
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still open");
}

#[test]
fn bad_names_are_refused_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let address = holder(folder.path());
    let (keeper, _) = connect(&address);
    let (_reader, writer) = pipe();
    for name in ["", "a:b", "with blank", "ä", &"x".repeat(300)] {
        assert!(matches!(keeper.keep(name, writer.as_fd()), Err(Error::Name { .. })), "{name}");
    }
    keeper.keep("good", writer.as_fd()).unwrap();
    assert_eq!(connect(&address).1.len(), 1);
}

#[test]
fn only_one_holder_serves_an_address() {
    let folder = tempfile::tempdir().unwrap();
    let address = holder(folder.path());
    assert!(matches!(hold::serve(&address), Err(hold::Error::Taken { .. })));
}

#[test]
fn without_a_holder_there_is_no_keeper() {
    let folder = tempfile::tempdir().unwrap();
    let address = folder.path().join("nobody.sock");
    assert!(!Holder::answers(&address));
    assert!(open(&Place::Auto(address.clone())).unwrap().is_none());
    assert!(matches!(open(&Place::Holder(address)), Err(Error::Connect { .. })));
    assert!(open(&Place::Nowhere).unwrap().is_none());
}

#[test]
fn a_holder_that_was_started_anew_gets_everything_again() {
    let folder = tempfile::tempdir().unwrap();
    let address = folder.path().join("hold.sock");
    let mut process = Child::start(&address);
    let (keeper, _) = connect(&address);
    let (_reader, writer) = pipe();
    keeper.keep("fuse.1", writer.as_fd()).unwrap();
    assert!(Holder::answers(&address));
    process.stop();
    assert!(!Holder::answers(&address));
    // What is to be kept while there is none is given to the next one too, unless it was released.
    for name in ["fuse.2", "fuse.3"] {
        keeper.keep(name, writer.as_fd()).unwrap_err();
    }
    keeper.release("fuse.3").unwrap();
    let _second = Child::start(&address);
    let deadline = Instant::now() + Duration::from_secs(20);
    let given = || connect(&address).1.into_iter().map(|kept| kept.name).collect::<Vec<_>>();
    while given() != ["fuse.1", "fuse.2"] {
        assert!(Instant::now() < deadline, "only {:?} given again", given());
        std::thread::sleep(Duration::from_millis(50));
    }
    keeper.keep("fuse.4", OwnedFd::from(writer).as_fd()).unwrap();
    assert_eq!(given().len(), 3);
}

/// A holder that can be killed: this test program itself, told to be one.
struct Child(std::process::Child);

const HOLD: &str = "SKIMMER_TEST_HOLD_AT";

/// Not a test by itself: the body of [`Child`].
#[test]
fn be_a_holder() {
    if let Some(address) = std::env::var_os(HOLD) {
        hold::serve(Path::new(&address)).unwrap();
    }
}

impl Child {
    fn start(address: &Path) -> Self {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "be_a_holder"])
            .env(HOLD, address)
            .spawn()
            .unwrap();
        let child = Self(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        while open(&Place::Holder(address.to_owned())).is_err() {
            assert!(Instant::now() < deadline, "no holder");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    fn stop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may be stopped already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
