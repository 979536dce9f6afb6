//! S20: directories and files that images are written to.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use super::canary::Canary;
use crate::support::archive::Archive;
use crate::support::images::write_layout;
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;

/// GHSA-g2h8-426c-7976: files of the image go where a link of an earlier image leads.
#[test]
fn security_s20_files_of_an_image_stay_in_their_directory() {
    let canary = Canary::new();
    let (path, climb) = (canary.path().display().to_string(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let out = place.dir.dir("out");
        let output = out.display().to_string();
        // What stands there is not the user's word: an earlier image, or somebody else, left it.
        for (name, target) in [
            ("abs", path.clone()),
            ("up", climb.clone()),
            ("secret", format!("{path}/secret")),
            ("hard", format!("{path}/secret")),
            ("pipe", format!("{path}/empty")),
        ] {
            symlink(target, out.join(name)).expect("ours");
        }
        let dockerfile = "FROM busybox AS made\n\
             RUN mkdir -p /r/abs/dir /r/up/new && for f in abs/secret abs/dir/secret up/secret up/new/f secret; \
             do echo dead > /r/$f; done && chmod 4755 /r/secret && chmod 777 /r/abs /r/up && \
             ln /r/secret /r/hard && ln /r/abs/secret /r/up/hard && mkfifo /r/pipe\n\
             FROM scratch\nCOPY --from=made /r/ /\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        for _ in 0..2 {
            rung.build(&place, upstream, &context, &["-o", &output])
                .success();
            canary.is_untouched(rung.name);
        }
        for name in ["abs", "up"] {
            assert!(out.join(name).symlink_metadata().expect("there").is_dir());
        }
        let secret = out.join("secret").symlink_metadata().expect("there");
        assert!(secret.is_file() && secret.nlink() == 2, "{secret:?}");
        assert_eq!(secret.permissions().mode() & 0o7000, 0o4000);
        assert_eq!(secret.uid(), rustix::process::geteuid().as_raw());
    });
}

/// What a layer itself plants, on its way out and not through a root filesystem.
#[test]
fn security_s20_links_of_an_image_lead_none_of_its_files_out() {
    let canary = Canary::new();
    let (path, climb) = (canary.path().display().to_string(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let archive = Archive::default()
            .symlink("abs", &path)
            .file("abs/secret", "dead")
            .symlink("up", &climb)
            .file("up/dir/secret", "dead")
            .hardlink("up/hard", "up/dir/secret")
            .symlink("leaf", &format!("{path}/secret"))
            .file("leaf", "dead");
        let layout = place.dir.join("evil");
        write_layout(&layout, &archive.end()[..], &serde_json::json!({}));
        let evil = format!("evil=oci-layout://{}", layout.display());
        let context = place.context("context", &[("Dockerfile", "FROM evil\n")]);
        for output in [
            "type=local,dest=D",
            "type=tar,dest=D/root.tar",
            "type=oci,tar=false,dest=D",
        ] {
            let out = place.dir.dir(&format!("out-{}", output.len()));
            let output = output.replace('D', &out.display().to_string());
            let args = ["--build-context", evil.as_str(), "-o", output.as_str()];
            rung.build(&place, upstream, &context, &args).success();
            canary.is_untouched(&format!("{} {output}", rung.name));
        }
    });
}

/// A layout that is there already, with links where blobs and indexes go.
#[test]
fn security_s20_links_in_a_layout_lead_nothing_out_of_it() {
    let canary = Canary::new();
    let path = canary.path().display().to_string();
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let context = place.context(
            "context",
            &[("Dockerfile", "FROM busybox\nRUN echo made > /made\n")],
        );
        for (number, link) in ["index.json", "oci-layout", "blobs", "blobs/sha256"]
            .iter()
            .enumerate()
        {
            let layout = place.dir.dir(&format!("layout-{number}"));
            let target = if link.starts_with("blobs") {
                path.clone()
            } else {
                format!("{path}/empty")
            };
            if *link == "blobs/sha256" {
                std::fs::create_dir(layout.join("blobs")).expect("ours");
            }
            symlink(target, layout.join(link)).expect("ours");
            let output = format!("type=oci,tar=false,dest={}", layout.display());
            let ran = rung.build(&place, upstream, &context, &["-o", &output]);
            assert!(matches!(ran.status.code(), Some(0..=70)), "{ran:?}");
            canary.is_untouched(&format!("{} {link}", rung.name));
        }
    });
}
