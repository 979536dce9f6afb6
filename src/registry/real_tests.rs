//! Against the reference implementation of a registry, with TLS and passwords, and
//! through connections that are cut.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::http::Timing;
use super::testing::{docker_config, image, quick};
use super::{BlobContent, Client, Options, PushedBlob, RegistryError};
use crate::image::{Descriptor, Digest, MediaType, Platform, Reference, Repository};

/// Whether `programs` are there; says so if not, and fails where all tests are required.
fn have(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| !std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
        .collect();
    if missing.is_empty() {
        return true;
    }
    let reason = format!("not installed: {missing:?}");
    let required = std::env::var_os("SOCKLESS_TEST_REQUIRE_ALL").is_some_and(|v| v == "1");
    assert!(!required, "{reason}");
    // Written past the test harness, which would hide it.
    let _ = std::io::Write::write_all(
        &mut std::io::stderr(),
        format!("skipped: {reason}\n").as_bytes(),
    );
    false
}

/// A running registry with a directory of its own.
struct Registry {
    child: Child,
    name: String,
    dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// With `secure`, TLS by a new issuer (`ca.pem` in `dir`) and the user `u`, password `p`.
    async fn start(secure: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if secure {
            make_certificates(dir.path());
            let passwords = Command::new("htpasswd")
                .args(["-Bbn", "u", "p"])
                .output()
                .unwrap();
            std::fs::write(dir.path().join("htpasswd"), passwords.stdout).unwrap();
        }
        // The port may be taken by another between its choice and its use.
        for _ in 0..10 {
            let port = {
                let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                listener.local_addr().unwrap().port()
            };
            let config = dir.path().join("config.yml");
            std::fs::write(&config, yaml(dir.path(), port, secure)).unwrap();
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            for _ in 0..600 {
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                let name = format!("127.0.0.1:{port}");
                if tokio::net::TcpStream::connect(&name).await.is_ok() {
                    return Self { child, name, dir };
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry does not start");
    }

    fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.name)).unwrap()
    }

    fn repository(&self, name: &str) -> Repository {
        self.reference(name).repository().clone()
    }

    fn ca(&self) -> std::path::PathBuf {
        self.dir.path().join("ca.pem")
    }
}

fn yaml(dir: &Path, port: u16, secure: bool) -> String {
    let dir = dir.display();
    let mut text = format!(
        "version: 0.1\nlog: {{level: error}}\n\
         storage: {{filesystem: {{rootdirectory: {dir}/data}}}}\n\
         http:\n  addr: 127.0.0.1:{port}\n"
    );
    if secure {
        text += &format!(
            "  tls: {{certificate: {dir}/cert.pem, key: {dir}/key.pem}}\n\
             auth: {{htpasswd: {{realm: test, path: {dir}/htpasswd}}}}\n"
        );
    }
    text
}

fn make_certificates(dir: &Path) {
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
         -subj /CN=test-issuer -keyout ca.key -out ca.pem && \
       openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=test \
         -keyout key.pem -out csr.pem && \
       printf 'subjectAltName=IP:127.0.0.1\\n' > ext && \
       openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
         -extfile ext -out cert.pem";
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
}

fn client(options: Options) -> Client {
    Client::with_timing(options, quick()).unwrap()
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(u32::to_le_bytes)
        .take(length)
        .collect()
}

/// Pushes an image of one layer and returns what happened to config and layer.
async fn push_image(client: &Client, to: &Reference, layer: &[u8]) -> Vec<PushedBlob> {
    let blobs = std::sync::Mutex::new(Vec::new());
    let manifest = image("linux/amd64", &[layer], |b| {
        blobs.lock().unwrap().push(b.to_vec());
    });
    let mut pushed = Vec::new();
    for blob in blobs.into_inner().unwrap() {
        let descriptor = Descriptor::of(MediaType::LAYER_TAR, &blob);
        let content = BlobContent::Bytes(blob);
        let result = client
            .push_blob(to.repository(), &descriptor, None, content, |_| {})
            .await;
        pushed.push(result.unwrap());
    }
    client.push_manifest(to, &manifest).await.unwrap();
    pushed
}

async fn round_trip(registry: &Registry, options: Options) {
    use PushedBlob::{AlreadyThere, Mounted, Uploaded};
    let layer = bytes(3_000_000);
    let first = client(options.clone());
    let reference = registry.reference("team/app:1");
    first.check_push(reference.repository()).await.unwrap();
    let pushed = push_image(&first, &reference, &layer).await;
    assert_eq!(pushed, [Uploaded, Uploaded]);

    let second = client(options.clone());
    let pushed = push_image(&second, &reference, &layer).await;
    assert_eq!(pushed, [AlreadyThere, AlreadyThere]);
    let platform = Platform::parse("linux/amd64").unwrap();
    let got = second.resolve(&reference, &platform).await.unwrap();
    assert!(!second.push_manifest(&reference, &got.raw).await.unwrap());
    let pinned = reference.with_digest(got.raw.digest.clone());
    assert_eq!(second.fetch_manifest(&pinned).await.unwrap(), got.raw);
    let mut stream = second
        .open_blob(reference.repository(), &got.manifest.layers[0])
        .await
        .unwrap();
    let mut read = Vec::new();
    stream.read_to_end(&mut read).await.unwrap();
    assert!(read == layer);

    let other = registry.repository("team/other");
    let pushed = second
        .push_blob(
            &other,
            &got.manifest.layers[0],
            None,
            BlobContent::Remote(reference.repository().clone()),
            |_| {},
        )
        .await;
    assert_eq!(pushed.unwrap(), Mounted);
    let has = async |repository: &Repository, digest: &Digest| {
        second.has_blob(repository, digest).await.unwrap()
    };
    assert!(has(&other, &got.manifest.layers[0].digest).await);
    assert!(!has(&other, &got.manifest.config.digest).await);

    let absent = registry.reference("team/app:2");
    let missing = second.fetch_manifest(&absent).await.unwrap_err();
    assert!(missing.is_not_found());
    assert!(
        missing.to_string().contains("404 MANIFEST_UNKNOWN"),
        "{missing}"
    );
}

#[tokio::test]
async fn a_plain_registry_takes_and_gives_images() {
    if !have(&["docker-registry"]) {
        return;
    }
    let registry = Registry::start(false).await;
    let options = Options {
        insecure: [registry.name.clone()].into(),
        docker_config: Some("/nonexistent".into()),
        ..Options::default()
    };
    round_trip(&registry, options.clone()).await;

    // Another client reads what was pushed.
    if !have(&["skopeo"]) {
        return;
    }
    let copy = registry.dir.path().join("copy");
    let output = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--src-tls-verify=false"])
        .arg(format!("docker://{}/team/app:1", registry.name))
        .arg(format!("dir:{}", copy.display()))
        .env("HOME", registry.dir.path())
        .env("XDG_RUNTIME_DIR", registry.dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let reference = registry.reference("team/app:1");
    let raw = client(options).fetch_manifest(&reference).await.unwrap();
    let copied = std::fs::read(copy.join("manifest.json")).unwrap();
    assert_eq!(Digest::of(&copied), raw.digest);
}

#[tokio::test]
async fn a_registry_with_tls_and_passwords_takes_and_gives_images() {
    if !have(&["docker-registry", "openssl", "htpasswd"]) {
        return;
    }
    let registry = Registry::start(true).await;
    let config = docker_config(&json!({registry.name.clone(): {"auth": "dTpw"}}));
    let trusting = Options {
        ca_files: vec![registry.ca()],
        docker_config: Some(config.path().to_owned()),
        ..Options::default()
    };
    round_trip(&registry, trusting.clone()).await;
    let reference = registry.reference("team/app:1");

    // Named as insecure, its certificate is not looked at, and TLS is still spoken.
    let insecure = Options {
        ca_files: Vec::new(),
        insecure: [registry.name.clone()].into(),
        ..trusting.clone()
    };
    client(insecure).fetch_manifest(&reference).await.unwrap();

    let strict = Options {
        ca_files: Vec::new(),
        ..trusting.clone()
    };
    let error = client(strict).fetch_manifest(&reference).await.unwrap_err();
    assert!(!error.is_temporary(), "{error}");
    assert!(
        error.hint().unwrap().contains("--registry-ca FILE"),
        "{error}"
    );
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");

    let wrong = docker_config(&json!({registry.name.clone(): {"auth": "dTp4"}}));
    for (config, expected) in [
        (wrong.path().to_owned(), "do not allow this"),
        ("/nonexistent".into(), "no credentials for 127.0.0.1:"),
    ] {
        let options = Options {
            docker_config: Some(config),
            ..trusting.clone()
        };
        let error = client(options)
            .check_push(reference.repository())
            .await
            .unwrap_err();
        assert_eq!(error.status(), Some(401));
        assert!(error.hint().unwrap().contains(expected), "{error}");
    }
}

/// Forwards connections to `to`; each of the first ones is torn down after the number of
/// bytes that `cuts` has for it, counted towards `to`.
async fn cutting_proxy(to: String, cuts: Vec<usize>) -> (String, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let torn = Arc::new(AtomicUsize::new(0));
    let count = torn.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let (to, cuts, torn) = (to.clone(), cuts.clone(), count.clone());
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(&to).await.unwrap();
                let (mut near_in, mut near_out) = near.split();
                let (mut far_in, mut far_out) = far.split();
                let forward = async {
                    let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
                    loop {
                        let read = near_in.read(&mut buffer).await.unwrap_or(0);
                        passed += read;
                        let done = torn.load(Ordering::SeqCst);
                        if cuts.get(done).is_some_and(|cut| passed > *cut) {
                            torn.fetch_add(1, Ordering::SeqCst);
                            return;
                        }
                        if read == 0 || far_out.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = forward => {}
                    _ = tokio::io::copy(&mut far_in, &mut near_out) => {}
                }
            });
        }
    });
    (name, torn)
}

#[tokio::test]
async fn an_upload_survives_connections_that_are_cut() {
    if !have(&["docker-registry"]) {
        return;
    }
    let registry = Registry::start(false).await;
    let (name, torn) = cutting_proxy(registry.name.clone(), vec![1_000_000, 2_500_000]).await;
    let options = Options {
        insecure: [name.clone()].into(),
        docker_config: Some("/nonexistent".into()),
        ..Options::default()
    };
    let content = bytes(4_000_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    std::fs::write(&path, &content).unwrap();
    let descriptor = Descriptor::of(MediaType::LAYER_GZIP, &content);
    let to = Reference::parse(&format!("{name}/a")).unwrap();
    let client = client(options);
    let pushed = client
        .push_blob(
            to.repository(),
            &descriptor,
            None,
            BlobContent::File(path),
            |_| {},
        )
        .await;
    assert_eq!(pushed.unwrap(), PushedBlob::Uploaded);
    assert_eq!(torn.load(Ordering::SeqCst), 2);
    let mut got = Vec::new();
    let mut stream = client
        .open_blob(to.repository(), &descriptor)
        .await
        .unwrap();
    stream.read_to_end(&mut got).await.unwrap();
    assert!(got == content);
}

/// Runs a test of this program in a process with another environment.
fn run_again(test: &str, variables: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact"])
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("1 passed"), "{test} {variables:?}: {said}");
}

#[test]
fn a_proxy_is_never_asked_for_this_machine() {
    // Nobody listens on port 1, so a request through it would fail.
    let proxy = "http://127.0.0.1:1";
    run_again(
        "registry::pull_tests::an_image_is_resolved_with_its_config",
        &[("http_proxy", proxy), ("https_proxy", proxy)],
    );
}

#[test]
fn a_system_without_roots_is_no_obstacle() {
    let none = [
        ("SSL_CERT_FILE", "/nonexistent"),
        ("SSL_CERT_DIR", "/nonexistent"),
    ];
    run_again(
        "registry::pull_tests::an_image_is_resolved_with_its_config",
        &none,
    );
    run_again(
        "registry::real_tests::a_registry_with_tls_and_passwords_takes_and_gives_images",
        &none,
    );
}

#[test]
fn a_ca_file_is_certificates_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    let check = |content: Option<&str>, expected: &str| {
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let options = Options {
            ca_files: vec![path.clone()],
            ..Options::default()
        };
        let error = Client::with_timing(options, Timing::default()).unwrap_err();
        assert!(matches!(error, RegistryError::CaFile { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(text.contains(expected), "{text}");
    };
    check(None, "No such file");
    check(Some("not PEM"), "no PEM certificate");
    check(
        Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        "certificate 1 in it",
    );
}

/// The engine runs these on any thread and keeps them in sets of tasks.
#[test]
fn futures_can_be_sent() {
    fn sent<T: Send + 'static>(_: T) {}
    let client = client(Options::default());
    let reference = Reference::parse("a").unwrap();
    let blob = Descriptor::of(MediaType::LAYER_TAR, b"");
    let (own, to, pushed) = (client.clone(), reference.clone(), blob.clone());
    sent(async move {
        let content = BlobContent::Bytes(Vec::new());
        let push = own.push_blob(to.repository(), &pushed, None, content, |_| {});
        push.await
    });
    sent(async move {
        let platform = Platform::host();
        let resolved = client.resolve(&reference, &platform).await?;
        client.push_manifest(&reference, &resolved.raw).await?;
        client.check_push(reference.repository()).await?;
        client.open_blob(reference.repository(), &blob).await
    });
}
