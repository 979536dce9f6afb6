//! Base images made on this machine, kept between runs, and the registries that serve them.

use std::fs::File;
use std::io::{BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::dir::TestDir;
use super::oci::{hex, sha256};
use super::process::run;
use super::registry::{Options, Registry};
use super::{find_program, repository};

/// Changes whenever what is made here changes, so that no stale image is used.
const RECIPE: &str = "3";

/// Starts a registry that has `library/busybox:latest`, an image of one static busybox.
///
/// # Errors
/// What the machine lacks.
pub fn busybox() -> Result<Registry, String> {
    super::programs(&["skopeo", "busybox"])?;
    registry_present()?;
    let program =
        std::fs::read(find_program("busybox").expect("probed")).map_err(|e| e.to_string())?;
    serve(
        &format!("busybox-{RECIPE}-{}", &sha256(&program)[7..19]),
        |layout| {
            let tar = busybox_tar(&program);
            let config = json!({
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["sh"],
            });
            write_layout(layout, &tar[..], &config);
            Ok(vec![(layout.into(), "library/busybox:latest".into())])
        },
    )
}

/// Starts a registry that has `library/ubuntu:latest`, which is a Debian made by debootstrap.
///
/// # Errors
/// What the machine lacks.
pub fn debian() -> Result<Registry, String> {
    super::programs(&["skopeo", "debootstrap"])?;
    registry_present()?;
    let script = repository().join("tests/debian-base.sh");
    let recipe = std::fs::read(&script).map_err(|e| e.to_string())?;
    serve(
        &format!("debian-{RECIPE}-{}", &sha256(&recipe)[7..19]),
        |layout| {
            super::namespaces()?;
            super::debian_mirror()?;
            let tar = layout.with_extension("tar");
            let mut command = Command::new(&script);
            command.arg(&tar).arg("bookworm");
            if let Ok(mirror) = std::env::var("SOCKLESS_TEST_DEBIAN_MIRROR") {
                command.arg(mirror);
            }
            run(&mut command).success();
            let config = json!({
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/bash"],
            });
            let file = File::open(&tar).map_err(|e| e.to_string())?;
            write_layout(layout, BufReader::new(file), &config);
            Ok(vec![(layout.into(), "library/ubuntu:latest".into())])
        },
    )
}

/// Whether registries can be started, or one is there already.
///
/// # Errors
/// What the machine lacks.
pub fn registry_present() -> Result<(), String> {
    match (
        find_program("docker-registry"),
        std::env::var("SOCKLESS_TEST_REGISTRY"),
    ) {
        (None, Err(_)) => Err("docker-registry is not installed".into()),
        _ => Ok(()),
    }
}

/// Serves the storage of this name, read-only; makes it first, in one process at a time.
///
/// `make` writes OCI layouts, at the path that it is given or below it, and says under which names
/// they are to be had. `name` has to change whenever these change.
///
/// # Errors
/// What `make` or the machine lacks.
pub fn serve(
    name: &str,
    make: impl FnOnce(&Path) -> Result<Vec<(PathBuf, String)>, String>,
) -> Result<Registry, String> {
    let cache = std::env::var_os("SOCKLESS_TEST_CACHE")
        .map_or_else(|| repository().join("target/fixtures"), PathBuf::from);
    std::fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let storage = cache.join(name);
    if !storage.exists() {
        let lock =
            File::create(cache.join("lock")).map_err(|e| format!("{}: {e}", cache.display()))?;
        lock.lock().map_err(|e| e.to_string())?;
        if !storage.exists() {
            let work = TestDir::new("fixture");
            let layout = work.join("layout");
            let images = make(&layout)?;
            let unfinished = cache.join(format!("{name}.{}", std::process::id()));
            let registry = Registry::start(Options {
                storage: Some(unfinished.clone()),
                ..Options::default()
            });
            for (layout, reference) in images {
                registry.push(&layout, &reference);
            }
            drop(registry);
            std::fs::rename(&unfinished, &storage).map_err(|e| e.to_string())?;
        }
    }
    Ok(Registry::start(Options {
        read_only_storage: Some(storage),
        ..Options::default()
    }))
}

/// Writes an OCI layout with one image of one layer. `config` is the image config's `config`.
pub fn write_layout(layout: &Path, mut tar: impl Read, config: &Value) {
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("ours");
    let mut hasher = Sha256::new();
    let layer = blobs.join("unfinished");
    let file = File::create(&layer).expect("ours");
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    let mut buffer = vec![0; 1 << 20];
    loop {
        let got = tar.read(&mut buffer).expect("a readable tar");
        if got == 0 {
            break;
        }
        hasher.update(&buffer[..got]);
        gzip.write_all(&buffer[..got]).expect("ours");
    }
    gzip.finish().expect("ours");
    let diff_id = format!("sha256:{}", hex(&hasher.finalize()));
    let compressed = std::fs::read(&layer).expect("written above");
    let layer_digest = sha256(&compressed);
    std::fs::rename(&layer, blobs.join(&layer_digest[7..])).expect("ours");

    let put = |document: Value| {
        let bytes = document.to_string().into_bytes();
        let digest = sha256(&bytes);
        std::fs::write(blobs.join(&digest[7..]), &bytes).expect("ours");
        (digest, bytes.len())
    };
    let (config_digest, config_size) = put(json!({
        "created": "2024-01-01T00:00:00Z",
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": if config.is_null() { json!({}) } else { config.clone() },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": "2024-01-01T00:00:00Z", "created_by": "base" }],
    }));
    let (manifest_digest, manifest_size) = put(json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest,
            "size": config_size,
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": layer_digest,
            "size": compressed.len(),
        }],
    }));
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest,
            "size": manifest_size,
        }],
    });
    std::fs::write(layout.join("index.json"), index.to_string()).expect("ours");
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .expect("ours");
}

/// A tar of files that belong to root.
pub fn small_tar(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        add(
            &mut tar,
            path,
            tar::EntryType::Regular,
            0o644,
            content.as_bytes(),
            "",
        );
    }
    tar.into_inner().expect("memory")
}

fn add(
    tar: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    mode: u32,
    content: &[u8],
    link: &str,
) {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    let (uid, gid) = if path == "home/app/" {
        (1000, 1001)
    } else {
        (0, 0)
    };
    header.set_uid(uid);
    header.set_gid(gid);
    header.set_mtime(1_704_067_200);
    header.set_size(content.len() as u64);
    if link.is_empty() {
        tar.append_data(&mut header, path, content).expect("memory");
    } else {
        tar.append_link(&mut header, path, link).expect("memory");
    }
}

fn busybox_tar(program: &[u8]) -> Vec<u8> {
    use tar::EntryType::{Directory, Regular, Symlink};
    let mut tar = tar::Builder::new(Vec::new());
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("home/app", 0o750),
        ("proc", 0o755),
        ("root", 0o700),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("var", 0o755),
    ] {
        add(&mut tar, &format!("{dir}/"), Directory, mode, b"", "");
    }
    add(&mut tar, "bin/busybox", Regular, 0o755, program, "");
    for applet in [
        "ash",
        "cat",
        "chmod",
        "chown",
        "cp",
        "cut",
        "date",
        "dd",
        "echo",
        "env",
        "expr",
        "false",
        "find",
        "grep",
        "head",
        "hostname",
        "id",
        "kill",
        "ln",
        "ls",
        "mkdir",
        "mount",
        "mv",
        "nc",
        "ps",
        "pwd",
        "readlink",
        "rm",
        "rmdir",
        "sed",
        "seq",
        "setsid",
        "sh",
        "sha256sum",
        "sleep",
        "sort",
        "stat",
        "tail",
        "test",
        "touch",
        "tr",
        "true",
        "uname",
        "wc",
        "wget",
        "whoami",
        "xargs",
    ] {
        add(
            &mut tar,
            &format!("bin/{applet}"),
            Symlink,
            0o777,
            b"",
            "busybox",
        );
    }
    add(
        &mut tar,
        "etc/passwd",
        Regular,
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n",
        "",
    );
    add(
        &mut tar,
        "etc/group",
        Regular,
        0o644,
        b"root:x:0:\napp:x:1001:\nextra:x:1002:app\n",
        "",
    );
    add(&mut tar, "etc/base", Regular, 0o644, b"from the base\n", "");
    tar.into_inner().expect("memory")
}
