//! A client of CRI, as kubelet is one.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest,
    ImageFsInfoRequest, ImageSpec, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListImagesRequest, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PullImageRequest, RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopPodSandboxRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::ctr::unique;

/// CRI at a containerd's socket.
pub struct Cri {
    runtime: Runtime,
    images: ImageServiceClient<Channel>,
    pods: RuntimeServiceClient<Channel>,
}

/// A pod on the host's network.
pub struct Pod {
    pub id: String,
    config: PodSandboxConfig,
}

/// How long CRI may take: a pull through it is a whole pull.
const LIMIT: Duration = Duration::from_secs(120);

impl Cri {
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime
            .block_on(containerd_client::connect(socket))
            .with_context(|| format!("connect to {}", socket.display()))?;
        let (images, pods) =
            (ImageServiceClient::new(channel.clone()), RuntimeServiceClient::new(channel));
        Ok(Self { runtime, images, pods })
    }

    /// Pulls an image for `pod`, as kubelet does; returns CRI's name for it.
    pub fn pull(&mut self, reference: &str, pod: Option<&Pod>) -> anyhow::Result<String> {
        let request = PullImageRequest {
            image: Some(image(reference)),
            auth: None,
            sandbox_config: pod.map(|pod| pod.config.clone()),
        };
        let reply = self
            .runtime
            .block_on(async { tokio::time::timeout(LIMIT, self.images.pull_image(request)).await });
        Ok(reply?.with_context(|| format!("pull {reference} through CRI"))?.into_inner().image_ref)
    }

    /// The tags of all images.
    pub fn images(&mut self) -> anyhow::Result<Vec<String>> {
        let reply =
            self.runtime.block_on(self.images.list_images(ListImagesRequest { filter: None }))?;
        Ok(reply.into_inner().images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    pub fn remove_image(&mut self, reference: &str) -> anyhow::Result<()> {
        let request = RemoveImageRequest { image: Some(image(reference)) };
        self.runtime.block_on(self.images.remove_image(request))?;
        Ok(())
    }

    /// Bytes that images and containers take, as kubelet is told.
    pub fn image_bytes(&mut self) -> anyhow::Result<u64> {
        let reply = self.runtime.block_on(self.images.image_fs_info(ImageFsInfoRequest {}))?;
        let used = reply.into_inner().image_filesystems.into_iter().filter_map(|f| f.used_bytes);
        used.map(|used| used.value).max().context("CRI knows no image file system")
    }

    /// Starts a pod with the host's namespaces.
    pub fn run_pod(&mut self, name: &str, logs: &Path) -> anyhow::Result<Pod> {
        let config = pod_config(name, logs)?;
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let reply = self.runtime.block_on(async {
            tokio::time::timeout(LIMIT, self.pods.run_pod_sandbox(request)).await
        });
        let id = reply?.context("start a pod")?.into_inner().pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// Starts `program` of a pulled image in `pod`; returns the container's id.
    pub fn start(
        &mut self,
        pod: &Pod,
        reference: &str,
        program: &[&str],
    ) -> anyhow::Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: format!("c{}", unique()), attempt: 0 }),
            image: Some(image(reference)),
            command: program.iter().map(|&part| part.to_owned()).collect(),
            log_path: "container.log".into(),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        self.runtime.block_on(async {
            let id = self
                .pods
                .create_container(request)
                .await
                .context("create a container")?
                .into_inner()
                .container_id;
            let start = StartContainerRequest { container_id: id.clone() };
            self.pods.start_container(start).await.context("start the container")?;
            Ok(id)
        })
    }

    /// Runs `program` in a container; returns its output.
    pub fn exec(&mut self, container: &str, program: &[&str]) -> anyhow::Result<String> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: program.iter().map(|&part| part.to_owned()).collect(),
            timeout: 60,
        };
        let reply = self.runtime.block_on(self.pods.exec_sync(request))?.into_inner();
        let (out, err) =
            (String::from_utf8_lossy(&reply.stdout), String::from_utf8_lossy(&reply.stderr));
        anyhow::ensure!(
            reply.exit_code == 0,
            "{program:?} ended with {}: {out}{err}",
            reply.exit_code
        );
        Ok(out.into_owned())
    }

    /// Stops and removes a pod with its containers.
    pub fn remove_pod(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let (stop, remove) = (
            StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() },
            RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() },
        );
        self.runtime.block_on(async {
            self.pods.stop_pod_sandbox(stop).await.context("stop the pod")?;
            self.pods.remove_pod_sandbox(remove).await.context("remove the pod")?;
            Ok(())
        })
    }
}

fn image(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..ImageSpec::default() }
}

fn pod_config(name: &str, logs: &Path) -> anyhow::Result<PodSandboxConfig> {
    std::fs::create_dir_all(logs)?;
    let host = i32::from(NamespaceMode::Node);
    let options =
        NamespaceOption { network: host, pid: host, ipc: host, ..NamespaceOption::default() };
    let context = LinuxSandboxSecurityContext {
        namespace_options: Some(options),
        ..LinuxSandboxSecurityContext::default()
    };
    Ok(PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-{}", unique()),
            namespace: "tests".into(),
            attempt: 0,
        }),
        log_directory: logs.to_string_lossy().into_owned(),
        labels: HashMap::new(),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(context),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    })
}
