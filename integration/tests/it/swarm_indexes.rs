//! Indexes through the swarm: what one node has read to its end, others mount lazily, if they may believe it.

use std::time::Duration;

use anyhow::Context as _;
use skimmer_identity::statement;
use skimmer_integration::command::wait_for;
use skimmer_integration::ctr::Pull;
use skimmer_integration::fleet::{CLUSTER, Fleet, Setup, Spec};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::member::Member;
use skimmer_integration::outsider::Outsider;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::index_file;
use skimmer_integration::tar::Tar;
use skimmer_proto::control::node_message::Message as Said;
use skimmer_proto::control::scheduler_message::Message as Heard;
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, Geometry, PieceTable, control};
use tokio::sync::oneshot;

use crate::fixtures::{blobs, busybox, data, seed};
use crate::swarm_burst::{LIMIT, MIB, check_egress, shaped};

const LEN: usize = 8 << 20;

/// Nodes that believe each other's indexes.
fn lazy() -> Setup {
    let mut setup = shaped();
    setup.skimmerd.min_layer_bytes = 0;
    setup
}

/// busybox and a file of noise, `/data/<name>`.
fn runnable(scenario: &Scenario, name: &str) -> anyhow::Result<Image> {
    let layers = vec![busybox(scenario, Format::Gzip)?, data(scenario, name, LEN, Format::Gzip)?];
    Plan::new(&format!("indexes/{name}"), layers).build(&blobs(scenario))
}

/// Waits until the scheduler tells of as many records for each layer of the image.
pub fn wait_records(fleet: &Fleet<'_>, image: &Image, count: usize) -> anyhow::Result<()> {
    let host = fleet.spare_host()?;
    let (manager, token) = (fleet.control.manager(), fleet.control.token(CLUSTER, "peer")?);
    host.block_on(async || {
        let member = Member::enrol(&manager, &token, "").await?;
        let mut stream = member.attend().await?;
        let end = tokio::time::Instant::now() + Duration::from_secs(60);
        for layer in &image.layers {
            let digest = layer.blob.digest.as_bytes().to_vec();
            let task = control::Task { digest, len: layer.blob.size, ..control::Task::default() };
            loop {
                stream.say(Said::Find(control::Find { task: Some(task.clone()) })).await?;
                let found = stream.wait(|heard| match heard {
                    Heard::Found(found) => Some(found.records.len()),
                    _ => None,
                });
                if found.await? >= count {
                    break;
                }
                anyhow::ensure!(tokio::time::Instant::now() < end, "no {count} records");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    })
}

/// What `md5sum` says of the noise in `/data/<name>`.
fn md5_of(name: &str) -> anyhow::Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), noise(seed(name), LEN))?;
    let text = skimmer_integration::command::run("md5sum", [file.path()])?;
    Ok(text.split(' ').next().context("md5sum said nothing")?.to_owned())
}

#[test]
fn a_seed_peers_word_makes_images_lazy_and_then_no_origin_is_needed() {
    scenario("swarm-index-seed", |scenario| {
        let mut fleet = Fleet::start(scenario, lazy())?;
        let seed = fleet.add(&Spec { role: "seed", ..Spec::default() })?;
        let lazy = fleet.add(&Spec { containerd: true, ..Spec::default() })?;
        fleet.wait_attending()?;
        let image = runnable(scenario, "seeded")?;
        let reference = fleet.registry.add(&image)?;
        fleet.machines[seed].build(&reference)?.wait(LIMIT)?;
        wait_records(&fleet, &image, 1)?;

        let machine = &fleet.machines[lazy];
        machine.containerd()?.pull(&Pull::new(&reference, "skimmer"))?;
        let modes = machine.skimmerd.modes(&reference)?;
        anyhow::ensure!(modes == ["lazy", "lazy"], "mounted {modes:?}");
        anyhow::ensure!(machine.from_peers()? < MIB, "a lazy pull fetched much already");
        check_egress(&fleet.registry, &image, 0)?;
        // From here on, the seed peer has the only copy.
        fleet.registry.stop()?;
        let machine = &fleet.machines[lazy];
        let said = machine.containerd()?.run_image(
            &reference,
            "skimmer",
            "reader",
            &["md5sum", "/data/seeded"],
        )?;
        anyhow::ensure!(said.starts_with(&md5_of("seeded")?), "read {said}");
        anyhow::ensure!(machine.from_peers()? > LEN as u64, "that wasn't through the swarm");
        check_egress(&fleet.registry, &image, 0)
    });
}

#[test]
fn two_nodes_make_images_lazy_unless_they_are_one_party() {
    scenario("swarm-index-peers", |scenario| {
        let mut fleet = Fleet::start(scenario, lazy())?;
        let call = ["token", "create", "--cluster", CLUSTER, "--uses", "2"];
        let made = fleet.control.ask(&call)?;
        let token = made["token"].as_str().context("no token was printed")?.to_owned();
        for token in [Some(token.as_str()), Some(token.as_str()), None, None] {
            fleet.add(&Spec { containerd: token.is_none(), token, ..Spec::default() })?;
        }
        fleet.wait_attending()?;
        let image = runnable(scenario, "witnessed")?;
        let reference = fleet.registry.add(&image)?;
        for machine in &fleet.machines[..2] {
            machine.build(&reference)?.wait(LIMIT)?;
        }
        wait_records(&fleet, &image, 1)?;
        for (number, expected) in [(2, "local"), (3, "lazy")] {
            let machine = &fleet.machines[number];
            machine.containerd()?.pull(&Pull::new(&reference, "skimmer"))?;
            let modes = || machine.skimmerd.modes(&reference);
            if expected == "local" {
                // One party's word isn't enough: the node reads all of it and sees for itself.
                wait_for("the layers are local", LIMIT, || {
                    modes().ok()?.iter().all(|mode| mode == "local").then_some(())
                })?;
                wait_records(&fleet, &image, 2)?;
            }
            let modes = modes()?;
            anyhow::ensure!(modes == [expected, expected], "node {number} mounted {modes:?}");
            let said = machine.containerd()?.run_image(
                &reference,
                "skimmer",
                "reader",
                &["md5sum", "/data/witnessed"],
            )?;
            anyhow::ensure!(said.starts_with(&md5_of("witnessed")?), "read {said}");
        }
        // A reader that waits too long for peers may go to the origin.
        check_egress(&fleet.registry, &image, image.compressed_bytes() / 2)
    });
}

/// An image of one plain layer with the file `/data/<name>`; all of them are equally long.
fn plain(scenario: &Scenario, name: &str) -> anyhow::Result<Image> {
    let tar = Tar::new().dir("data/").file(format!("data/{name}"), &noise(seed(name), LEN / 4));
    let layer = Layer::of(&tar.end(), Format::Plain, &blobs(scenario))?;
    Plan::new(&format!("indexes/{name}"), vec![layer]).build(&blobs(scenario))
}

/// A table and an index that say that `image` holds what another does; every piece is right.
fn lie(image: &Image, other: &std::path::Path) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    // The format is described where bundles are made: magic, length of the table, table, index.
    let bundle = std::fs::read(other)?;
    let (len, rest) = bundle.get(8..).and_then(|rest| rest.split_first_chunk()).context("short")?;
    let index = rest.get(usize::try_from(u64::from_le_bytes(*len))?..).context("short")?.to_vec();
    let layer = &image.layers[0];
    let (bytes, geometry) =
        (layer.blob.bytes()?, Geometry::of(layer.blob.size).context("a long blob")?);
    let value = |piece: u32| -> anyhow::Result<[u8; 32]> {
        let span = geometry.span(piece);
        let span = usize::try_from(span.start)?..usize::try_from(span.end)?;
        Ok(piece_value(geometry, piece, &bytes[span]))
    };
    let values: anyhow::Result<Vec<_>> = (0..geometry.pieces()).map(value).collect();
    let (blob, diff_id) = (layer.blob.digest, layer.diff_id);
    let table = PieceTable::new(geometry, blob, diff_id, Digest::of(&index), values?)?;
    Ok((table.encode(), index))
}

#[test]
fn a_seed_peer_that_lies_about_a_layer_is_found_out() {
    scenario("swarm-index-lie", |scenario| {
        let mut fleet = Fleet::start(scenario, lazy())?;
        fleet.add(&Spec { containerd: true, ..Spec::default() })?;
        fleet.add(&Spec::default())?;
        fleet.wait_attending()?;
        let (true_image, decoy) = (plain(scenario, "truth")?, plain(scenario, "decoy")?);
        let reference = fleet.registry.add(&true_image)?;
        let [victim, witness] = &fleet.machines[..] else { anyhow::bail!("two nodes") };
        witness.build(&fleet.registry.add(&decoy)?)?.wait(LIMIT)?;
        witness.skimmerd.export_indexes(&decoy, &scenario.path("indexes"))?;
        let of_decoy = index_file(&scenario.path("indexes"), &decoy.layers[0].blob.digest);
        let (table, index) = lie(&true_image, &of_decoy)?;

        let host = fleet.spare_host()?;
        let (manager, token) = (fleet.control.manager(), fleet.control.token(CLUSTER, "seed")?);
        let address = format!("/ip4/{}/tcp/4001", host.address());
        let (blob, len) = (true_image.layers[0].blob.digest, true_image.layers[0].blob.size);
        let (told, tells) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::scope(|scope| -> anyhow::Result<()> {
            let liar = scope.spawn(|| {
                host.block_on(async move || {
                    let member = Member::enrol(&manager, &token, "").await?;
                    let objects = vec![table.clone(), index];
                    let _outsider = Outsider::start(&member, &address, objects).await?;
                    let stream = member.attend_at(address).await?;
                    let (credentials, table) = (&member.credentials, Digest::of(&table));
                    let certificate = credentials.certificate();
                    let record =
                        statement::sign_index(credentials.key(), &certificate, &blob, &table);
                    let digest = blob.as_bytes().to_vec();
                    let task = Some(control::Task { digest, len, ..control::Task::default() });
                    let publish = control::Publish { task, record: Some(record) };
                    stream.say(Said::Publish(publish)).await?;
                    told.send(member.id())?;
                    // Dropped when it has been found out, or when the test has failed.
                    let _ = stopped.await;
                    Ok(())
                })
            });
            let found_out = (|| {
                let id = tells.recv_timeout(LIMIT).context("the liar didn't start")?;
                find_out(&fleet, &true_image, &reference, &id)
            })();
            drop(stop);
            let lied = liar.join().map_err(|_| anyhow::anyhow!("the liar panicked"))?;
            found_out.and(lied)
        })?;
        for part in ["vouched for an index that is wrong", "not what it was taken for"] {
            victim.skimmerd.expect_log(part);
        }
        for machine in &fleet.machines {
            machine.skimmerd.expect_log("the control plane purges an index");
        }
        Ok(())
    });
}

/// The first node believes the liar, reads everything, and sees; another says so too; the liar is out.
fn find_out(fleet: &Fleet<'_>, image: &Image, reference: &str, liar: &str) -> anyhow::Result<()> {
    wait_records(fleet, image, 1)?;
    let [victim, witness] = &fleet.machines[..] else { anyhow::bail!("two nodes") };
    victim.containerd()?.pull(&Pull::new(reference, "skimmer"))?;
    let modes = victim.skimmerd.modes(reference)?;
    anyhow::ensure!(modes == ["lazy"], "mounted {modes:?}: the lie wasn't believed");
    let said = victim.begin(&["fetch", reference])?.wait_failed(LIMIT)?;
    anyhow::ensure!(said.contains("index"), "{said}");
    wait_for("the first node reads the layer for itself", LIMIT, || {
        victim.build(reference).ok()?.wait(LIMIT).ok()
    })?;
    witness.build(reference)?.wait(LIMIT)?;
    wait_for("the liar is revoked", LIMIT, || {
        let nodes = fleet.control.ask(&["node", "list"]).ok()?;
        let node = nodes.as_array()?.iter().find(|node| node["peer"] == liar)?;
        (node["revoked"] == true).then_some(())
    })
}

#[test]
fn what_a_node_read_before_its_restart_counts_after_it() {
    scenario("swarm-index-restart", |scenario| {
        let mut fleet = Fleet::start(scenario, lazy())?;
        let seed = fleet.add(&Spec { role: "seed", ..Spec::default() })?;
        fleet.wait_attending()?;
        let image = runnable(scenario, "restated")?;
        let reference = fleet.registry.add(&image)?;
        fleet.machines[seed].build(&reference)?.wait(LIMIT)?;
        wait_records(&fleet, &image, 1)?;
        // Nobody remembers but its disk.
        fleet.machines[seed].skimmerd.terminate()?;
        fleet.control.terminate()?;
        fleet.control.run()?;
        fleet.machines[seed].skimmerd.run()?;
        fleet.wait_attending()?;
        wait_records(&fleet, &image, 1)
    });
}
