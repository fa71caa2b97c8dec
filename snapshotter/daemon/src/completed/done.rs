//! Which images have been put into the content store. Pure.
//!
//! Invariant: nothing is remembered of an image that containerd no longer has.

use std::collections::BTreeMap;
use std::time::SystemTime;

use skimmer_proto::Digest;
use skimmer_snapshots::inventory::Installed;

/// See [`Installed::key`].
type Key = (String, Vec<Digest>);

/// With the time when the latest of its records was written: one that was removed and came again is another.
#[derive(Default)]
pub struct Done(BTreeMap<Key, SystemTime>);

impl Done {
    /// Those of `images`, which are all that containerd has, that are yet to be put; each once, whatever its names.
    pub fn missing(&mut self, images: Vec<Installed>) -> Vec<Installed> {
        let mut latest: BTreeMap<Key, Installed> = BTreeMap::new();
        for image in images {
            let key = image.key();
            if latest.get(&key).is_none_or(|other| other.recorded < image.recorded) {
                latest.insert(key, image);
            }
        }
        self.0.retain(|key, _| latest.contains_key(key));
        latest.retain(|key, image| self.0.get(key) != Some(&image.recorded));
        latest.into_values().collect()
    }

    pub fn insert(&mut self, image: &Installed) {
        self.0.insert(image.key(), image.recorded);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn image(namespace: &str, name: &str, content: &str, recorded: u64) -> Installed {
        let manifest = Digest::of(content.as_bytes());
        Installed {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            recorded: SystemTime::UNIX_EPOCH + Duration::from_secs(recorded),
            manifest,
            layers: Vec::new(),
            manifests: vec![manifest],
            config: Digest::of(b"config"),
            blobs: Vec::new(),
        }
    }

    #[test]
    fn images_are_missing_until_they_are_put_and_when_they_come_again() {
        let first = image("default", "first", "one", 1);
        let mut done = Done::default();
        // What failed stays missing.
        for _ in 0..2 {
            let missing = done.missing(vec![first.clone()]);
            assert_eq!(missing, std::slice::from_ref(&first));
        }
        done.insert(&first);
        for (others, missing) in [
            (vec![], vec![]),
            (vec![image("default", "second", "two", 1)], vec!["second"]),
            (vec![image("other", "first", "one", 1)], vec!["first"]),
            (vec![image("default", "older", "one", 0)], vec![]),
            (vec![image("default", "newer", "one", 2)], vec!["newer"]),
        ] {
            let images = others.into_iter().chain([first.clone()]).collect();
            let found = done.missing(images);
            let names: Vec<&str> = found.iter().map(|image| image.name.as_str()).collect();
            assert_eq!(names, missing);
        }
        let again = image("default", "first", "one", 3);
        assert_eq!(done.missing(vec![again.clone()]), [again]);
    }

    #[test]
    fn what_has_gone_is_forgotten() {
        let first = image("default", "first", "one", 1);
        let mut done = Done::default();
        done.insert(&first);
        assert!(done.missing(Vec::new()).is_empty());
        assert_eq!(done.missing(vec![first.clone()]), [first]);
    }
}
