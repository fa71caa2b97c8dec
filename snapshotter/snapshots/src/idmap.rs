//! User-namespace mappings as containerd's labels carry them: `0:100000:65536[,…]`. Pure.

use crate::Labels;

pub const UID_LABEL: &str = "containerd.io/snapshot/uidmapping";
pub const GID_LABEL: &str = "containerd.io/snapshot/gidmapping";

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("id mapping {0:?} is not a list of <container id>:<host id>:<count>")]
    Syntax(String),
    #[error("id mapping {0:?} does not map id 0, which owns the root folder")]
    NoRoot(String),
}

/// Which ids of the host stand for a container's. One left out of the labels is as on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub uids: Vec<Range>,
    pub gids: Vec<Range>,
}

/// `count` ids: from `container` on inside, from `host` on outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub container: u32,
    pub host: u32,
    pub count: u32,
}

/// All ids, as they are. The last number isn't an id.
const SAME: Range = Range { container: 0, host: 0, count: u32::MAX };

impl Mapping {
    /// What the labels ask for, if anything. Both mappings have the id 0, which owns the root folder.
    pub fn of(labels: &Labels) -> Result<Option<Self>, Error> {
        let (uids, gids) = (labels.get(UID_LABEL), labels.get(GID_LABEL));
        if uids.is_none() && gids.is_none() {
            return Ok(None);
        }
        let read = |text: Option<&String>| text.map_or(Ok(vec![SAME]), |text| ranges(text));
        Ok(Some(Self { uids: read(uids)?, gids: read(gids)? }))
    }

    /// The host's user and group for the container's root.
    pub fn owner(&self) -> (u32, u32) {
        (root(&self.uids).unwrap_or(0), root(&self.gids).unwrap_or(0))
    }
}

/// Host user and group that own a snapshot's root folder, if the labels ask for a mapping.
pub fn owner(labels: &Labels) -> Result<Option<(u32, u32)>, Error> {
    Ok(Mapping::of(labels)?.map(|mapping| mapping.owner()))
}

/// The labels' mappings as mount options.
pub fn options(labels: &Labels) -> Vec<String> {
    let option = |name: &str, label: &str| labels.get(label).map(|map| format!("{name}={map}"));
    [option("uidmap", UID_LABEL), option("gidmap", GID_LABEL)].into_iter().flatten().collect()
}

fn ranges(text: &str) -> Result<Vec<Range>, Error> {
    let range = |entry: &str| -> Option<Range> {
        let mut numbers = entry.split(':').map(str::parse::<u32>);
        let mut next = || numbers.next()?.ok();
        let range = Range { container: next()?, host: next()?, count: next()? };
        range.container.checked_add(range.count)?;
        range.host.checked_add(range.count)?;
        numbers.next().is_none().then_some(range)
    };
    let found: Option<Vec<Range>> = text.split(',').map(range).collect();
    let found = found.ok_or_else(|| Error::Syntax(text.to_owned()))?;
    root(&found).ok_or_else(|| Error::NoRoot(text.to_owned()))?;
    Ok(found)
}

/// The host's id for id 0 in the container.
fn root(ranges: &[Range]) -> Option<u32> {
    ranges.iter().find(|range| range.container == 0 && range.count > 0).map(|range| range.host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_owner_of_the_root_folder() {
        let syntax = |text: &str| Err(Error::Syntax(text.to_owned()));
        for (mapping, expected) in [
            ("0:100000:65536", Ok(100_000)),
            ("0:0:1", Ok(0)),
            ("0:0:4294967295", Ok(0)),
            ("1:200:5,0:7:1", Ok(7)),
            ("0:7:0", Err(Error::NoRoot("0:7:0".to_owned()))),
            ("1:7:10", Err(Error::NoRoot("1:7:10".to_owned()))),
            ("", syntax("")),
            ("0:1", syntax("0:1")),
            ("0:1:2:3", syntax("0:1:2:3")),
            ("0:-1:2", syntax("0:-1:2")),
            ("0:4294967295:2", syntax("0:4294967295:2")),
        ] {
            let found = ranges(mapping).map(|ranges| root(&ranges).unwrap());
            assert_eq!(found, expected, "{mapping}");
        }
    }

    #[test]
    fn reads_the_labels() {
        let labels = |pairs: &[(&str, &str)]| -> Labels {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        assert_eq!(owner(&labels(&[("a", "b")])), Ok(None));
        let both = labels(&[(UID_LABEL, "0:5:10"), (GID_LABEL, "0:6:10")]);
        assert_eq!(owner(&both), Ok(Some((5, 6))));
        assert_eq!(options(&both), ["uidmap=0:5:10", "gidmap=0:6:10"]);
        assert_eq!(owner(&labels(&[(UID_LABEL, "0:5:10")])), Ok(Some((5, 0))));
        let range = |container, host, count| Range { container, host, count };
        let users = labels(&[(UID_LABEL, "0:5:10,10:100:1")]);
        let mapping = Mapping { uids: vec![range(0, 5, 10), range(10, 100, 1)], gids: vec![SAME] };
        assert_eq!(Mapping::of(&users), Ok(Some(mapping)));
        assert!(owner(&labels(&[(UID_LABEL, "x")])).is_err());
    }
}
