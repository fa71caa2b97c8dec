//! A private registry: Debian's `docker-registry` over a folder, and what was asked of it.
//!
//! Images are put straight into its storage (distribution's `registry/storage/paths.go` describes the layout), so that a
//! test can serve what no registry would accept.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skimmer_proto::Digest;

use crate::command;
use crate::files::replace;
use crate::image::{Image, link};
use crate::issuer::{Account, Issuer, Life};
use crate::network::{self, Host};
use crate::process::Process;
use crate::scenario::Scenario;

/// How long tokens are good for, where that isn't tested.
const TOKENS: Duration = Duration::from_secs(300);

/// Who may pull.
pub enum Auth {
    Anyone,
    Basic {
        user: &'static str,
        password: &'static str,
    },
    /// The same, each of these.
    Users(&'static [(&'static str, &'static str)]),
    /// Bearer tokens from an issuer that wants this user.
    Token {
        user: &'static str,
        password: &'static str,
        lifetime: Duration,
    },
    /// The same, but the tokens end sooner than the issuer says.
    Fleeting {
        user: &'static str,
        password: &'static str,
        lifetime: Duration,
    },
    /// Bearer tokens for any of these.
    Accounts(Vec<Account>),
}

/// A request that the registry has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub status: u16,
    /// Of the body; a HEAD has none.
    pub bytes: u64,
    pub agent: String,
}

/// A running registry.
pub struct Registry {
    process: Option<Process>,
    name: String,
    /// `host:port`
    address: String,
    folder: PathBuf,
    logs: PathBuf,
    program: Vec<String>,
    // Held for as long as the registry sends clients to it.
    _issuer: Option<Issuer>,
}

impl Registry {
    /// A registry on loopback, open to anyone.
    pub fn start(scenario: &Scenario) -> anyhow::Result<Self> {
        Self::start_with(scenario, "registry", &Auth::Anyone, None)
    }

    /// A registry called `name` within the scenario, on `host` if given.
    pub fn start_with(
        scenario: &Scenario,
        name: &str,
        auth: &Auth,
        host: Option<&Host>,
    ) -> anyhow::Result<Self> {
        let folder = scenario.path(name);
        std::fs::create_dir_all(folder.join("storage"))?;
        let issuer = match auth {
            Auth::Token { user, password, lifetime } => {
                let account = Account { user, password, may_pull: true };
                Some(Issuer::start(&folder, &[account], Life::honest(*lifetime))?)
            }
            Auth::Fleeting { user, password, lifetime } => {
                let account = Account { user, password, may_pull: true };
                let life = Life { said: TOKENS, written: *lifetime };
                Some(Issuer::start(&folder, &[account], life)?)
            }
            Auth::Accounts(accounts) => {
                Some(Issuer::start(&folder, accounts, Life::honest(TOKENS))?)
            }
            _ => None,
        };
        let ip = host.map_or("127.0.0.1".to_owned(), |host| host.address().to_string());
        let config = folder.join("config.yml");
        let storage = folder.join("storage");
        let access = access_section(&folder, auth, issuer.as_ref())?;
        let write = |port: &str| {
            std::fs::write(&config, configuration(&storage, &format!("{ip}:{port}"), &access))
        };
        write("0")?;

        let mut program = network::program_on(host, "docker-registry");
        program.extend(["serve".into(), config.display().to_string()]);

        let logs = scenario.logs();
        let mut registry = Self {
            process: None,
            name: name.to_owned(),
            address: ip.clone(),
            folder: folder.clone(),
            logs,
            program,
            _issuer: issuer,
        };
        let port = registry.run()?;
        // Fixed from here on, so that it comes back where it was.
        write(&port)?;
        registry.address = format!("{}:{port}", registry.address);
        registry.write_hosts(&scenario.hosts(), "http", "")?;
        Ok(registry)
    }

    /// `host:port`, as references name it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Stops it, as an outage would.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    /// Stops it in the middle of whatever it does, without closing a connection.
    pub fn freeze(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn thaw(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let process = self.process.as_ref().context("the registry isn't running")?;
        kill(Pid::from_raw(process.id().try_into()?), signal)?;
        Ok(())
    }

    /// Starts it again where it was.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.run()?;
        Ok(())
    }

    /// Starts it again where it was, over TLS, with a new certificate that nobody trusts yet.
    pub fn renew_certificate(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let (certificate, key) = (self.certificate(), self.folder.join("tls.key"));
        let (host, _) = self.address.rsplit_once(':').context("an address has a port")?;
        let mut request = Command::new("openssl");
        request.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
        request.args(["-nodes", "-days", "2", "-subj", "/CN=registry", "-addext"]);
        request.arg(format!("subjectAltName=IP:{host}"));
        request.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
        command::output_of(&mut request, command::PATIENCE)?;
        let config = self.folder.join("config.yml");
        let mut settings = std::fs::read_to_string(&config)?;
        if !settings.contains("tls:") {
            let tls =
                format!("tls: {{certificate: {}, key: {}}}", certificate.display(), key.display());
            settings = settings.replace("secret: tests}", &format!("secret: tests, {tls}}}"));
        }
        std::fs::write(&config, settings)?;
        self.resume()
    }

    /// Lets containerd and skimmerd trust the certificate that it has now.
    pub fn trust(&self, scenario: &Scenario) -> anyhow::Result<()> {
        let ca = scenario.hosts().join(&self.address).join("ca.pem");
        replace(&ca, std::fs::read(self.certificate())?)?;
        let more = format!("ca = \"{}\"\n", ca.display());
        self.write_hosts(&scenario.hosts(), "https", &more)
    }

    fn certificate(&self) -> PathBuf {
        self.folder.join("tls.pem")
    }

    /// Serves `image`; returns its reference.
    pub fn add(&self, image: &Image) -> anyhow::Result<String> {
        let repository = self.storage().join("repositories").join(&image.name);
        for blob in image.blobs() {
            let data = self.data(&blob.digest);
            std::fs::create_dir_all(data.parent().context("blob path has no folder")?)?;
            link(&blob.path, &data)?;
            write_link(&repository.join("_layers/sha256").join(blob.digest.hex()), &blob.digest)?;
        }
        for manifest in std::iter::once(&image.manifest).chain(&image.index).chain(&image.foreign) {
            write_link(
                &repository.join("_manifests/revisions/sha256").join(manifest.digest.hex()),
                &manifest.digest,
            )?;
        }
        let (top, _) = image.top();
        let tag = repository.join("_manifests/tags/latest");
        write_link(&tag.join("current"), &top.digest)?;
        write_link(&tag.join("index/sha256").join(top.digest.hex()), &top.digest)?;
        Ok(self.reference(image))
    }

    /// The reference of an image in this registry.
    pub fn reference(&self, image: &Image) -> String {
        format!("{}/{}:latest", self.address, image.name)
    }

    /// Serves other bytes under `digest` than the ones it names.
    pub fn falsify(
        &self,
        digest: &Digest,
        change: impl FnOnce(&mut Vec<u8>),
    ) -> anyhow::Result<()> {
        let data = self.data(digest);
        let mut bytes = std::fs::read(&data).with_context(|| format!("read {}", data.display()))?;
        change(&mut bytes);
        // A new file: the old one may be shared with other images.
        std::fs::remove_file(&data)?;
        std::fs::write(&data, bytes)?;
        Ok(())
    }

    /// Loses a blob.
    pub fn lose(&self, digest: &Digest) -> anyhow::Result<()> {
        std::fs::remove_file(self.data(digest)).with_context(|| format!("remove {digest}"))
    }

    /// Everything answered so far, in order.
    ///
    /// The log is written when an answer is complete, and answers of one client's different connections may overlap.
    pub fn requests(&self) -> Vec<Request> {
        let log = std::fs::read(self.logs.join(format!("{}.out", self.name))).unwrap_or_default();
        String::from_utf8_lossy(&log).lines().filter_map(parse_access).collect()
    }

    /// The bytes of everything sent since `already` requests were answered.
    pub fn sent_since(&self, already: usize) -> u64 {
        let requests = self.requests();
        let bodies = requests.iter().skip(already).filter(|request| request.status < 300);
        bodies.map(|request| request.bytes).sum()
    }

    /// What containerd and its clients, not skimmerd, asked for since `already` requests were answered, in order: methods
    /// and paths.
    pub fn asked_by_containerd(&self, already: usize) -> Vec<(String, String)> {
        let requests = self.requests().into_iter().skip(already);
        let others = requests.filter(|request| !request.agent.contains("skimmer"));
        others.map(|request| (request.method, request.path)).collect()
    }

    /// Waits until no answer is under way: the access log has an answer only when it is complete.
    pub fn settle(&self) -> anyhow::Result<()> {
        let mut before = None;
        command::wait_for("the registry answers no more", Duration::from_secs(30), || {
            let now = self.requests().len();
            if before == Some(now) {
                return Some(());
            }
            before = Some(now);
            std::thread::sleep(Duration::from_millis(300));
            None
        })
    }

    /// The bytes sent of the blob `digest`, and of how many requests.
    pub fn sent(&self, digest: &Digest) -> Sent {
        let suffix = format!("/blobs/{digest}");
        let mut sent = Sent::default();
        for request in self.requests() {
            if request.method == "GET" && request.path.ends_with(&suffix) && request.status < 300 {
                sent.requests += 1;
                sent.bytes += request.bytes;
                sent.by_daemon += if request.agent.contains("skimmer") { request.bytes } else { 0 };
            }
        }
        sent
    }

    /// The bytes sent of all of an image's layers.
    pub fn sent_of(&self, image: &Image) -> Sent {
        let mut digests: Vec<Digest> = image.layers.iter().map(|layer| layer.blob.digest).collect();
        digests.sort();
        digests.dedup();
        digests.iter().map(|digest| self.sent(digest)).fold(Sent::default(), |sum, sent| Sent {
            requests: sum.requests + sent.requests,
            bytes: sum.bytes + sent.bytes,
            by_daemon: sum.by_daemon + sent.by_daemon,
        })
    }

    fn run(&mut self) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]);
        let log = self.logs.join(format!("{}.log", self.name));
        let already = std::fs::read(&log).map_or(0, |bytes| bytes.len());
        let mut process = Process::start(&self.name, &command, &self.logs)?;
        let marker = "listening on ";
        let port = process.wait_ready("the registry listens", Duration::from_secs(30), || {
            let bytes = std::fs::read(&log).ok()?;
            let text = String::from_utf8_lossy(bytes.get(already..)?).into_owned();
            let address = text.split_once(marker)?.1.split_once('"')?.0.to_owned();
            Some(address.rsplit_once(':')?.1.to_owned())
        })?;
        self.process = Some(process);
        Ok(port)
    }

    fn storage(&self) -> PathBuf {
        self.folder.join("storage/docker/registry/v2")
    }

    fn data(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.storage().join("blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    /// Tells containerd and skimmerd how this registry is spoken to; `more` are lines for its host.
    fn write_hosts(&self, hosts: &Path, scheme: &str, more: &str) -> anyhow::Result<()> {
        let folder = hosts.join(&self.address);
        std::fs::create_dir_all(&folder)?;
        let url = format!("{scheme}://{}", self.address);
        let text = format!(
            "server = \"{url}\"\n\n[host.\"{url}\"]\ncapabilities = [\"pull\", \"resolve\"]\n{more}"
        );
        replace(&folder.join("hosts.toml"), text)
    }
}

/// What a registry sent of a blob, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub requests: usize,
    pub bytes: u64,
    /// The part of `bytes` that went to skimmerd and not to containerd.
    pub by_daemon: u64,
}

fn configuration(storage: &Path, address: &str, access: &str) -> String {
    format!(
        "version: 0.1\n\
         log: {{level: info, formatter: json, accesslog: {{disabled: false}}}}\n\
         storage:\n  filesystem: {{rootdirectory: {}}}\n  maintenance: {{uploadpurging: {{enabled: false}}}}\n\
         http: {{addr: \"{address}\", secret: tests}}\n\
         {access}",
        storage.display()
    )
}

fn access_section(folder: &Path, auth: &Auth, issuer: Option<&Issuer>) -> anyhow::Result<String> {
    match auth {
        Auth::Anyone => Ok(String::new()),
        Auth::Basic { user, password } => basic_section(folder, &[(user, password)]),
        Auth::Users(users) => basic_section(folder, users),
        Auth::Token { .. } | Auth::Fleeting { .. } | Auth::Accounts(_) => {
            let issuer = issuer.context("token authentication needs an issuer")?;
            Ok(format!(
                "auth:\n  token: {{realm: \"{}\", service: tests, issuer: tests, rootcertbundle: {}}}\n",
                issuer.url(),
                issuer.certificate().display()
            ))
        }
    }
}

fn basic_section(folder: &Path, users: &[(&str, &str)]) -> anyhow::Result<String> {
    let file = folder.join("htpasswd");
    let lines: anyhow::Result<Vec<String>> = users
        .iter()
        .map(|(user, password)| command::run("htpasswd", ["-nbB", user, password]))
        .collect();
    std::fs::write(&file, lines?.concat())?;
    Ok(format!("auth:\n  htpasswd: {{realm: tests, path: {}}}\n", file.display()))
}

fn write_link(folder: &Path, digest: &Digest) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("link"), digest.to_string())?;
    Ok(())
}

/// Apache's combined format: `host - user [time] "METHOD path HTTP/1.1" status bytes "referrer" "agent"`.
fn parse_access(line: &str) -> Option<Request> {
    let mut quoted = line.split('"');
    let _client = quoted.next()?;
    let mut request = quoted.next()?.split(' ');
    let mut numbers = quoted.next()?.split_ascii_whitespace();
    let agent = quoted.nth(2)?;
    Some(Request {
        method: request.next()?.to_owned(),
        path: request.next()?.split('?').next()?.to_owned(),
        status: numbers.next()?.parse().ok()?,
        bytes: numbers.next()?.parse().ok()?,
        agent: agent.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::{Request, parse_access};

    #[test]
    fn access_lines_are_read() {
        let line = r#"127.0.0.1 - - [22/Nov/2026:04:36:14 +0000] "GET /v2/a/b/blobs/sha256:c1 HTTP/1.1" 206 401 "" "containerd/2.1""#;
        let request = Request {
            method: "GET".into(),
            path: "/v2/a/b/blobs/sha256:c1".into(),
            status: 206,
            bytes: 401,
            agent: "containerd/2.1".into(),
        };
        assert_eq!(parse_access(line), Some(request));
        assert_eq!(parse_access("{\"msg\": \"listening\"}"), None);
    }
}
