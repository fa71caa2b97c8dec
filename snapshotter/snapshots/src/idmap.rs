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

/// Host user and group that own a snapshot's root folder, if the labels ask for a mapping. A mapping
/// for one of the two leaves the other as it is.
pub fn owner(labels: &Labels) -> Result<Option<(u32, u32)>, Error> {
    let (uids, gids) = (labels.get(UID_LABEL), labels.get(GID_LABEL));
    if uids.is_none() && gids.is_none() {
        return Ok(None);
    }
    let root = |mapping: Option<&String>| mapping.map_or(Ok(0), |mapping| root(mapping));
    Ok(Some((root(uids)?, root(gids)?)))
}

/// The labels' mappings as mount options.
pub fn options(labels: &Labels) -> Vec<String> {
    let option = |name: &str, label: &str| labels.get(label).map(|map| format!("{name}={map}"));
    [option("uidmap", UID_LABEL), option("gidmap", GID_LABEL)].into_iter().flatten().collect()
}

/// The host's id for id 0 in the container.
fn root(mapping: &str) -> Result<u32, Error> {
    let syntax = || Error::Syntax(mapping.to_owned());
    let mut found = None;
    for entry in mapping.split(',') {
        let numbers: Vec<u32> =
            entry.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| syntax())?;
        let &[container, host, count] = numbers.as_slice() else {
            return Err(syntax());
        };
        let end = host.checked_add(count).ok_or_else(syntax)?;
        container.checked_add(count).ok_or_else(syntax)?;
        if container == 0 && count > 0 && end != u32::MAX && found.is_none() {
            found = Some(host);
        }
    }
    found.ok_or_else(|| Error::NoRoot(mapping.to_owned()))
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
            ("1:200:5,0:7:1", Ok(7)),
            ("0:7:0", Err(Error::NoRoot("0:7:0".to_owned()))),
            ("1:7:10", Err(Error::NoRoot("1:7:10".to_owned()))),
            ("", syntax("")),
            ("0:1", syntax("0:1")),
            ("0:1:2:3", syntax("0:1:2:3")),
            ("0:-1:2", syntax("0:-1:2")),
            ("0:4294967295:2", syntax("0:4294967295:2")),
        ] {
            assert_eq!(root(mapping), expected, "{mapping}");
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
        assert!(owner(&labels(&[(UID_LABEL, "x")])).is_err());
    }
}
