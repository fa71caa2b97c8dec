//! `skimmer get`: any file over HTTP, through the swarm. The registry's blobs are the files.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use skimmer_integration::command::{self, wait_for};
use skimmer_integration::fleet::{Fleet, Machine, Setup};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::Format;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_proto::Digest;

use crate::fixtures::{blobs, data};

/// For what happens meanwhile, on a busy machine.
const NOTICE: Duration = Duration::from_secs(60);

/// What else a file may cost its origin: a byte for each node that looks for it.
const PROBES: u64 = 64;

/// An image whose layers are the files, and their addresses.
fn files(
    scenario: &Scenario,
    fleet: &Fleet<'_>,
    sizes: &[usize],
) -> anyhow::Result<(Image, Vec<String>)> {
    let layer =
        |(n, size): (usize, &usize)| data(scenario, &format!("file-{n}"), *size, Format::Gzip);
    let layers: anyhow::Result<Vec<_>> = sizes.iter().enumerate().map(layer).collect();
    let image = Plan::new("files/app", layers?).build(&blobs(scenario))?;
    fleet.registry.add(&image)?;
    let host = fleet.registry.address();
    let url = |digest: &Digest| format!("http://{host}/v2/files/app/blobs/{digest}");
    let urls = image.layers.iter().map(|layer| url(&layer.blob.digest)).collect();
    Ok((image, urls))
}

/// A call of `skimmer get`, and the file that it writes.
fn call(machine: &Machine, arguments: &[&str], name: &str) -> anyhow::Result<(Command, PathBuf)> {
    let file = machine.skimmerd.root().with_extension(name);
    let mut call = machine.skimmerd.skimmer(&["get"])?;
    call.args(arguments).arg("--out").arg(&file);
    Ok((call, file))
}

/// Gets a file, and what `skimmer` said of it in the end.
fn get(machine: &Machine, arguments: &[&str], name: &str) -> anyhow::Result<(Value, PathBuf)> {
    let (mut call, file) = call(machine, arguments, name)?;
    let said = command::output_of(&mut call, command::PATIENCE)?;
    let last = said.lines().last().context("skimmer get said nothing")?;
    Ok((serde_json::from_str(last)?, file))
}

fn same(file: &Path, digest: &Digest) -> anyhow::Result<()> {
    let found = Digest::of(&std::fs::read(file)?);
    anyhow::ensure!(found == *digest, "{} has the digest {found}", file.display());
    Ok(())
}

#[test]
fn a_file_leaves_its_origin_once() {
    scenario("swarm-files", |scenario| {
        let mut fleet = Fleet::of(scenario, Setup::default(), 3)?;
        let (image, urls) = files(scenario, &fleet, &[5 << 20, 6 << 20, 7 << 20])?;
        let layer = |n: usize| (image.layers[n].blob.digest, image.layers[n].blob.size);
        let egress = |fleet: &Fleet<'_>, n: usize| fleet.registry.sent(&layer(n).0).bytes;

        // By digest, then by address and ETag, one node after the other.
        for (n, by_digest) in [(0, true), (1, false)] {
            let (digest, size) = layer(n);
            let (text, url) = (digest.to_string(), urls[n].as_str());
            let arguments = if by_digest { vec!["--digest", &text, url] } else { vec![url] };
            for (number, machine) in fleet.machines[..2].iter().enumerate() {
                let (said, file) = get(machine, &arguments, &format!("get-{n}"))?;
                same(&file, &digest)?;
                assert_eq!((&said["shared"], &said["bytes"]), (&true.into(), &size.into()));
                assert_eq!(said["verified"], by_digest, "{said}");
                let (origin, swarm) = if number == 0 { (size, 0) } else { (0, size) };
                assert_eq!(
                    (&said["origin_bytes"], &said["swarm_bytes"]),
                    (&origin.into(), &swarm.into())
                );
                assert!(!file.with_extension(format!("get-{n}.part")).exists());
            }
            assert!(egress(&fleet, n) <= size + PROBES, "{} of {size}", egress(&fleet, n));
        }

        // All at once.
        let (digest, size) = layer(2);
        let text = digest.to_string();
        let mut calls = Vec::new();
        for machine in &fleet.machines {
            let (mut call, file) = call(machine, &["--digest", &text, &urls[2]], "get-2")?;
            calls.push((call.stdout(Stdio::null()).spawn()?, file));
        }
        for (mut child, file) in calls {
            let ended =
                wait_for("the file is here", command::PATIENCE, || child.try_wait().ok()?)?;
            anyhow::ensure!(ended.success(), "skimmer get ended with {ended}");
            same(&file, &digest)?;
        }
        assert!(egress(&fleet, 2) <= size + PROBES, "{} of {size}", egress(&fleet, 2));

        // What is whole somewhere takes no origin, if it is known by its digest.
        fleet.registry.stop()?;
        let text = layer(0).0.to_string();
        let (said, file) = get(&fleet.machines[2], &["--digest", &text, &urls[0]], "late")?;
        same(&file, &layer(0).0)?;
        assert_eq!((&said["origin_bytes"], &said["verified"]), (&0.into(), &true.into()), "{said}");
        Ok(())
    });
}

#[test]
fn a_file_is_had_in_parts_and_goes_on_where_it_stopped() {
    scenario("swarm-files-parts", |scenario| {
        let setup = Setup { bits_per_second: Some(24_000_000), ..Setup::default() };
        let fleet = Fleet::of(scenario, setup, 1)?;
        let machine = &fleet.machines[0];
        let (image, urls) = files(scenario, &fleet, &[12 << 20, 1 << 20])?;
        let (digest, size) = (image.layers[0].blob.digest, image.layers[0].blob.size);

        let (mut begun, file) = call(machine, &[&urls[0]], "resumed")?;
        let mut child = begun.stdout(Stdio::null()).spawn()?;
        let part = file.with_extension("resumed.part");
        let enough = || std::fs::metadata(&part).ok().filter(|part| part.len() > 2 << 20);
        let waited = wait_for("a part is here", NOTICE, enough);
        child.kill()?;
        child.wait()?;
        let kept = waited?.len();
        let (mut again, _) = call(machine, &[&urls[0]], "resumed")?;
        let said = command::output_of(&mut again, command::PATIENCE)?;
        let first: Value = serde_json::from_str(said.lines().next().context("no progress")?)?;
        assert!(first["bytes"].as_u64() > Some(kept), "{first} after {kept} bytes");
        same(&file, &digest)?;
        let sent = fleet.registry.sent(&digest).bytes;
        assert!(sent <= size + size / 2, "{sent} of {size}: what had come was fetched again");

        let whole = std::fs::read(&file)?;
        for (range, expected) in
            [("1000-1999", &whole[1000..2000]), ("12582000-", &whole[12_582_000..])]
        {
            let (_, file) = get(machine, &["--range", range, &urls[0]], "range")?;
            assert!(std::fs::read(&file)? == expected, "{range}");
        }
        let (small, text) = (&image.layers[1].blob, digest.to_string());
        let address = urls[1].replace("http://", "http://user:s3cret@");
        for (arguments, why) in
            [(vec!["--direct", &urls[1]], "directly"), (vec![&address], "credentials")]
        {
            let arguments: Vec<&str> = arguments.iter().map(|a| a.as_ref()).collect();
            let (said, file) = get(machine, &arguments, "direct")?;
            same(&file, &small.digest)?;
            assert_eq!(
                (&said["shared"], &said["origin_bytes"]),
                (&false.into(), &small.size.into())
            );
            assert!(said["why"].as_str().is_some_and(|text| text.contains(why)), "{said}");
        }
        assert!(!machine.skimmerd.log().contains("s3cret"), "the password is in the log");

        let missing = urls[1].replace("sha256:", "sha256:0");
        let absent = format!("http://{}/nothing", fleet.registry.address());
        for (arguments, code) in [
            (vec!["--digest", &text, &urls[1]], 4),
            (vec![&absent], 5),
            (vec![&missing], 1),
            (vec!["ftp://example.com/a"], 1),
            (vec!["--range", "x", &urls[1]], 2),
        ] {
            let arguments: Vec<&str> = arguments.iter().map(|a| a.as_ref()).collect();
            let (mut call, file) = call(machine, &arguments, "failed")?;
            let ended = command::finish(&mut call, command::PATIENCE)?;
            assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {ended:?}");
            assert!(!file.exists(), "{arguments:?}");
        }
        Ok(())
    });
}

#[test]
fn a_files_host_is_trusted_as_hosts_toml_says() {
    scenario("swarm-files-trust", |scenario| {
        let mut fleet = Fleet::of(scenario, Setup::default(), 1)?;
        let (image, urls) = files(scenario, &fleet, &[1 << 20])?;
        fleet.registry.renew_certificate()?;
        // It has made its own certificate, which nobody else vouches for.
        fleet.registry.trust(scenario)?;
        let url = urls[0].replace("http://", "https://");
        let (_, file) = get(&fleet.machines[0], &[&url], "trusted")?;
        same(&file, &image.layers[0].blob.digest)
    });
}
