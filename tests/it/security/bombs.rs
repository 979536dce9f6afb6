//! S16: little that becomes much.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use super::upstream;
use crate::support::archive::{Archive, header};
use crate::support::find_program;
use crate::support::oci::{hex, sha256};
use crate::support::process::{Ran, run_reading};
use crate::support::programs;
use crate::support::sockless::Place;

/// What sockless may have in memory when it ends a bomb, in KiB.
const PEAK_KIB: u64 = 64 * 1024;
/// What a bomb becomes, in bytes.
const BLAST_BYTES: u64 = 10 << 30;

/// Zeros in pieces of this size are the same each time.
const PIECE_BYTES: u64 = 64 << 20;

/// An archive of one file of 10 GiB, in 10 MB: as dense as gzip gets.
fn gzip_bomb() -> Vec<u8> {
    let compress = |bytes: &[u8]| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(bytes).expect("memory");
        gzip.finish().expect("memory")
    };
    let piece = compress(&vec![0; PIECE_BYTES as usize]);
    let mut bomb = compress(&header(b'0', "bomb", BLAST_BYTES));
    for _ in 0..BLAST_BYTES / PIECE_BYTES + 1 {
        bomb.extend_from_slice(&piece);
    }
    bomb
}

/// The same in 330 kB of zstd, and again compressed in 40: blocks of one byte repeated.
fn zstd_bomb() -> Vec<u8> {
    // The magic number, a window of 128 KiB, and a block as it is.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, (17 - 10) << 3];
    bomb.extend_from_slice(&(512_u32 << 3).to_le_bytes()[..3]);
    bomb.extend_from_slice(&header(b'0', "bomb", BLAST_BYTES));
    let repeated = ((128_u32 << 10) << 3) | 2;
    for _ in 0..BLAST_BYTES / (128 << 10) {
        bomb.extend_from_slice(&repeated.to_le_bytes()[..3]);
        bomb.push(0);
    }
    // The last block: the end of the archive.
    bomb.extend_from_slice(&((1024_u32 << 3) | 2 | 1).to_le_bytes()[..3]);
    bomb.push(0);
    bomb
}

/// An image of one layer that is what it says but for its diff ID, which nobody gets to see.
fn image_of(layout: &Path, layer: &[u8], media_type: &str) {
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        crate::support::dir::write(layout, &format!("blobs/sha256/{}", &digest[7..]), bytes);
        json!({ "digest": digest, "size": bytes.len() })
    };
    let typed = |mut descriptor: serde_json::Value, media_type: &str| {
        descriptor["mediaType"] = media_type.into();
        descriptor
    };
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&[7; 32]))] },
        "history": [{ "created_by": "bomb" }],
    });
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": typed(
            put(config.to_string().as_bytes()),
            "application/vnd.oci.image.config.v1+json",
        ),
        "layers": [typed(put(layer), media_type)],
    });
    let manifest = typed(put(manifest.to_string().as_bytes()), manifest_type);
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    crate::support::dir::write(layout, "index.json", index.to_string());
    crate::support::dir::write(layout, "oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
}

/// Builds; what it had in memory at most must be little, and what it leaves behind nothing.
fn survives(place: &Place, args: &[&str], stdin: Stdio) -> Ran {
    let report = place.dir.join("time");
    let time = find_program("time").expect("probed");
    let mut command: Command = place.wrapped(&[
        &time.display().to_string(),
        "--quiet",
        "--format=%M",
        "--output",
        &report.display().to_string(),
    ]);
    let ran = run_reading(
        command.args(["build", "--progress", "plain"]).args(args),
        stdin,
    );
    let peak = std::fs::read_to_string(&report).expect("written by time");
    let peak: u64 = peak.trim().parse().expect("a number of KiB");
    assert!(peak < PEAK_KIB, "{peak} KiB: {ran:?}");
    assert_eq!(ran.status.signal(), None, "{ran:?}");
    assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    let left = crate::support::process::run(
        Command::new("du")
            .args(["--summarize", "--block-size=1M"])
            .arg(place.dir.join("store")),
    );
    let left = left.success().stdout;
    let left: u64 = left
        .split_whitespace()
        .next()
        .map_or(0, |n| n.parse().unwrap_or(0));
    assert!(left < 64, "{left} MiB are left in the store");
    ran
}

#[test]
fn security_s16_bombs_end_with_an_error_and_in_little_memory() {
    needs!(programs(&["time"]));
    let bombs = [
        (
            "gzip",
            gzip_bomb(),
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        (
            "zstd",
            zstd_bomb(),
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
    ];
    let reason = "too many uncompressed bytes for each compressed one; the limit is 200";
    for (name, bomb, media_type) in &bombs {
        let size = if *name == "gzip" { 11 << 20 } else { 330_000 };
        assert!(bomb.len() < size, "{name}: {}", bomb.len());
        // A layer that is unpacked: for COPY, which reads it, and for its files as they are.
        let place = Place::new();
        let layout = place.dir.join("evil");
        image_of(&layout, bomb, media_type);
        let evil = format!("evil=oci-layout://{}", layout.display());
        let out = place.dir.join("out").display().to_string();
        for dockerfile in ["FROM scratch\nCOPY --from=evil / /\n", "FROM evil\n"] {
            let context = place.context("context", &[("Dockerfile", dockerfile)]);
            let context = context.display().to_string();
            let args = ["--build-context", &evil, "-o", &out, &context];
            survives(&place, &args, Stdio::null())
                .failure()
                .says(reason);
        }
        // An archive that ADD unpacks.
        let context = place.context("context", &[("Dockerfile", "FROM scratch\nADD bomb /\n")]);
        std::fs::write(context.join("bomb"), bomb).expect("ours");
        let context = context.display().to_string();
        survives(&place, &[&context], Stdio::null())
            .failure()
            .says(reason);
        // A whole context.
        let file = place.dir.file("bomb", bomb);
        let stdin = File::open(&file).expect("just written");
        survives(&place, &["-"], stdin.into())
            .failure()
            .says(reason);
    }
}

#[test]
fn security_s16_holes_sizes_and_depths_that_are_too_much_are_said() {
    needs!(programs(&["time"]));
    let sparse = Archive::default().entry(
        b'0',
        "f",
        "",
        b"",
        &[
            ("GNU.sparse.size", "64424509440"),
            ("GNU.sparse.numblocks", "1"),
            ("GNU.sparse.map", "0,0"),
        ],
    );
    // Deeper than a path can be, and as deep as one can.
    let too_deep = Archive::default().file(&"d/".repeat(3000), "");
    let deep = Archive::default().file(&format!("{}f", "d/".repeat(2000)), "deep");
    let long_name = Archive::default().file(&"n".repeat(300), "");
    let lies = [&header(b'0', "f", 1 << 62)[..], &[0; 4096]].concat();
    for (name, archive, reason) in [
        ("sparse", sparse.end(), Some("holes of too many bytes")),
        (
            "too deep",
            too_deep.end(),
            Some("a path of too many bytes; the limit is 4096"),
        ),
        ("deep", deep.end(), None),
        ("long name", long_name.end(), Some("File name too long")),
        ("lies", lies, Some("")),
    ] {
        for door in ["context", "ADD", "layer"] {
            let place = Place::new();
            eprintln!("{name} by {door}");
            let output = format!("type=tar,dest={}", place.dir.join("out.tar").display());
            let context = |text: &str| {
                let context = place.context("context", &[("Dockerfile", text)]);
                std::fs::write(context.join("a.tar"), &archive).expect("ours");
                context.display().to_string()
            };
            let ran = match door {
                "context" => {
                    let whole = Archive::default().file("Dockerfile", "FROM scratch\nCOPY . /\n");
                    let whole = [whole.bytes(), archive.clone()].concat();
                    let stdin = File::open(place.dir.file("stdin", whole)).expect("written");
                    survives(&place, &["-o", &output, "-"], stdin.into())
                }
                "ADD" => {
                    let context = context("FROM scratch\nADD a.tar /\n");
                    survives(&place, &["-o", &output, &context], Stdio::null())
                }
                _ => {
                    let layout = place.dir.join("evil");
                    image_of(&layout, &archive, "application/vnd.oci.image.layer.v1.tar");
                    let evil = format!("evil=oci-layout://{}", layout.display());
                    let context = context("FROM scratch\nCOPY --from=evil / /\n");
                    let args = ["--build-context", &evil, "-o", &output, &context];
                    survives(&place, &args, Stdio::null())
                }
            };
            match reason {
                Some(reason) => drop(ran.failure().says(reason)),
                // Its diff ID is not what the image says.
                None if door == "layer" => drop(ran.failure().says("want sha256:0707")),
                None => drop(ran.success()),
            }
        }
    }
}

/// GHSA-72x6-4j93-7w86: documents of an image that no image needs.
#[test]
fn security_s16_giant_documents_are_not_read() {
    needs!(programs(&["time"]));
    let upstream = upstream!();
    drop(upstream);
    let padding = "x".repeat(5 << 20);
    for document in ["manifest", "config", "index.json"] {
        let place = Place::new();
        let layout = place.dir.join("evil");
        image_of(&layout, b"", "application/vnd.oci.image.layer.v1.tar");
        let index = layout.join("index.json");
        let read = |path: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(path).expect("there")).expect("JSON")
        };
        let blob = |descriptor: &serde_json::Value| {
            let digest = descriptor["digest"].as_str().expect("a digest");
            layout.join("blobs/sha256").join(&digest[7..])
        };
        let put = |value: &serde_json::Value, descriptor: &serde_json::Value| {
            let bytes = value.to_string();
            let mut descriptor = descriptor.clone();
            descriptor["digest"] = sha256(bytes.as_bytes()).into();
            descriptor["size"] = bytes.len().into();
            std::fs::write(blob(&descriptor), bytes).expect("ours");
            descriptor
        };
        let mut top = read(&index);
        let mut manifest = read(&blob(&top["manifests"][0]));
        match document {
            "config" => {
                let mut config = read(&blob(&manifest["config"]));
                config["author"] = padding.clone().into();
                manifest["config"] = put(&config, &manifest["config"]);
            }
            "manifest" => manifest["annotations"] = json!({ "x": padding }),
            _ => top["annotations"] = json!({ "x": padding }),
        }
        top["manifests"][0] = put(&manifest, &top["manifests"][0]);
        std::fs::write(&index, top.to_string()).expect("ours");
        let evil = format!("evil=oci-layout://{}", layout.display());
        let context = place.context("context", &[("Dockerfile", "FROM evil\nLABEL a=b\n")]);
        let context = context.display().to_string();
        survives(&place, &["--build-context", &evil, &context], Stdio::null())
            .failure()
            .says("larger than");
    }
}
