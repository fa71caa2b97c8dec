//! What containerd's Prepare tells of the layer it wants. Pure.

use skimmer_proto::{Digest, Reference};

use super::Error;
use crate::Labels;
use crate::snapshot::REFERENCE_LABEL;

const IMAGE_LABEL: &str = "containerd.io/snapshot/cri.image-ref";
const MANIFEST_LABEL: &str = "containerd.io/snapshot/cri.manifest-digest";

/// A request for a layer. All but the chain ID and the namespace are hints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// containerd's namespace.
    pub namespace: String,
    /// The chain ID that the layer completes.
    pub reference: Digest,
    /// The chain ID that the snapshot parent claims; `None` without a parent.
    pub below: Option<Digest>,
    pub manifest: Option<Digest>,
    pub image: Option<Reference>,
}

impl Request {
    /// Reads the key and labels of a Prepare. `below` is what the snapshot parent claims to be:
    /// `None` without a parent, an empty text for a parent that claims nothing.
    pub fn new(key: &str, labels: &Labels, below: Option<&str>) -> Result<Self, Error> {
        let digest = |what, text: &str| {
            text.parse().map_err(|source| Error::Digest { what, text: text.to_owned(), source })
        };
        let label = |name: &str| labels.get(name).map(String::as_str);
        let manifest = label(MANIFEST_LABEL);
        Ok(Self {
            namespace: namespace(key).ok_or_else(|| Error::Key(key.to_owned()))?.to_owned(),
            reference: digest("chain ID", label(REFERENCE_LABEL).unwrap_or_default())?,
            below: below.map(|text| digest("the snapshot parent's chain ID", text)).transpose()?,
            manifest: manifest.map(|text| digest("manifest digest", text)).transpose()?,
            image: label(IMAGE_LABEL).and_then(|text| text.parse().ok()),
        })
    }
}

/// containerd's keys are `<namespace>/<number>/<the client's key>`.
fn namespace(key: &str) -> Option<&str> {
    let (namespace, rest) = key.split_once('/')?;
    let (number, _) = rest.split_once('/')?;
    let numbered = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    (numbered && !namespace.is_empty()).then_some(namespace)
}
