//! Work on an image's layers outside any container: building indexes, completing what is missing.

use std::sync::Arc;

use skimmer_proto::Digest;

use super::Layers;
use crate::layer::{Failure, Layer, LayerSpec};

impl Layers {
    /// Makes sure that each layer has an index: pulls through those that have none, mounted or not.
    pub async fn build(&self, specs: Vec<LayerSpec>) -> Result<(), Failure> {
        let index = async |layer: &Arc<Layer>| {
            layer.ready().await?;
            if layer.is_provisional() { layer.complete().await } else { Ok(()) }
        };
        self.each(specs, index).await
    }

    /// Fetches what is missing of each layer, and verifies it.
    pub async fn complete(&self, specs: Vec<LayerSpec>) -> Result<(), Failure> {
        self.each(specs, async |layer| layer.complete().await).await
    }

    /// Begins all layers, does `work` on one after the other, and lets go of those that nobody else
    /// uses. The first failure is the result; the others' work is done all the same.
    async fn each(
        &self,
        specs: Vec<LayerSpec>,
        work: impl AsyncFn(&Arc<Layer>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let unused: Vec<Digest> =
            specs.iter().map(|s| s.blob.digest).filter(|d| self.get(*d).is_empty()).collect();
        let begun: Vec<_> = specs.into_iter().map(|spec| self.begin(spec)).collect();
        let mut result = Ok(());
        for layer in &begun {
            let done = work(layer).await;
            result = result.and(done);
        }
        for digest in unused {
            // A snapshot that took it meanwhile has mounted it.
            if begun.iter().all(|l| l.digest() != digest || l.mounted().is_none()) {
                self.release(digest).await;
            }
        }
        result
    }
}
