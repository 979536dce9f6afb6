//! Memory stays bounded whatever the size of a layer.

use std::io::Write as _;

use crate::support::process::run;
use crate::support::sockless::Place;
use crate::support::{images, namespaces, programs};

/// What the program may take at its height, whatever it builds.
const PEAK_KIB: u64 = 150 * 1024;

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
    // Three times the bound, of bytes that do not compress well: a counter run through a multiplier.
    let mut large =
        std::io::BufWriter::new(std::fs::File::create(context.join("large")).expect("ours"));
    let mut state = 1_u64;
    for _ in 0..450 * 1024 * 1024 / 8 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        large
            .write_all(&(state >> 20).to_le_bytes())
            .expect("room on the disk");
    }
    large.flush().expect("room on the disk");

    let report = place.dir.join("time");
    let archive = place.dir.join("image.tar");
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
            &format!("docker.io={}", upstream.url()),
            "-o",
        ])
        .arg(format!("type=oci,dest={}", archive.display()))
        .arg(&context))
    .success();
    let peak: u64 = std::fs::read_to_string(&report)
        .expect("written by time")
        .trim()
        .parse()
        .expect("a number of KiB");
    eprintln!("peak memory: {} MiB", peak / 1024);
    assert!(peak < PEAK_KIB, "{peak} KiB, want less than {PEAK_KIB}");
}
