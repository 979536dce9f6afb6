//! Memory stays bounded whatever the size of a layer, and whatever the number of layers.

use std::io::Write as _;
use std::path::Path;

use crate::support::process::run;
use crate::support::registry::{Options, Registry};
use crate::support::sockless::Place;
use crate::support::{images, namespaces, programs};

/// What the program may take at its height, whatever it builds: the 64 MiB in which all layers
/// are compressed, which two processors do not use up, and 36 MiB for everything else, which
/// takes some 30.
pub const PEAK_KIB: u64 = 100 * 1024;

#[test]
fn sandbox_a_build_of_large_layers_takes_little_memory() {
    needs!(programs(&["time"]), namespaces());
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let place = Place::new();
    let context = place.context(
        "context",
        &[(
            "Dockerfile",
            "FROM busybox\nCOPY large /copied\nRUN cat /copied /copied > /made\n",
        )],
    );
    // Four times the bound.
    write_large(&context.join("large"), 450, 1);
    let output = format!("type=oci,dest={}", place.dir.join("image.tar").display());
    let peak = peak_of(&place, &upstream.url(), &["-o", &output], &context);
    assert!(peak < PEAK_KIB, "{peak} KiB, want less than {PEAK_KIB}");
}

/// All layers are sealed and sent at one time: none waits for what is below it.
#[test]
fn a_build_of_many_large_layers_takes_no_more() {
    needs!(programs(&["time", "docker-registry"]));
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let registry = Registry::start(Options::default());
    let names = ["a", "b", "c", "d", "e", "f"];
    let copies = names.map(|name| format!("COPY --link {name} /\n")).concat();
    for compression in ["gzip", "zstd"] {
        let place = Place::new();
        let dockerfile = format!("FROM scratch\n{copies}");
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        for (seed, name) in (1..).zip(names) {
            write_large(&context.join(name), 100, seed);
        }
        let tag = format!("{}/{compression}:1", registry.host);
        let args = [
            "--insecure-registry",
            &registry.host,
            "--push",
            "-t",
            &tag,
            "--compression",
            compression,
        ];
        let peak = peak_of(&place, &upstream.url(), &args, &context);
        assert!(
            peak < PEAK_KIB,
            "{compression}: {peak} KiB, want less than {PEAK_KIB}"
        );
    }
}

/// Bytes that do not compress well: a counter run through a multiplier.
pub fn write_large(path: &Path, mebibytes: u64, seed: u64) {
    let mut large = std::io::BufWriter::new(std::fs::File::create(path).expect("ours"));
    let mut state = seed;
    for _ in 0..mebibytes << 17 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        large
            .write_all(&(state >> 20).to_le_bytes())
            .expect("room on the disk");
    }
    large.flush().expect("room on the disk");
}

/// The most memory that a build had, in KiB.
pub fn peak_of(place: &Place, upstream: &str, args: &[&str], context: &Path) -> u64 {
    let report = place.dir.join("time");
    let time = crate::support::find_program("time").expect("probed");
    run(place
        .wrapped(&[
            &time.display().to_string(),
            "--quiet",
            "--format=%M",
            "--output",
            &report.display().to_string(),
        ])
        .args([
            "build",
            "--registry-mirror",
            &format!("docker.io={upstream}"),
        ])
        .args(args)
        .arg(context))
    .success();
    let peak: u64 = std::fs::read_to_string(&report)
        .expect("written by time")
        .trim()
        .parse()
        .expect("a number of KiB");
    eprintln!("peak memory: {} MiB", peak / 1024);
    peak
}
