//! S4, S5: where a build context ends, and what a repository may say.

use std::os::unix::fs::symlink;

use super::canary::{Canary, SONG};
use super::upstream;
use crate::support::archive::Archive;
use crate::support::process::{run, run_reading};
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;
use crate::support::web::Web;

const COPIES: &str = "FROM scratch\nCOPY Dockerfile /\n";

/// Kinds of context that a stranger may have made, with these links in them.
enum Kind {
    Directory,
    Archive,
    Git,
}

/// What a build of a context with these links says; each link is given as name and target.
fn build_with_links(kind: &Kind, files: &[(&str, &str)], links: &[(&str, &str)]) -> (Place, bool) {
    let place = Place::new();
    let output = format!("type=oci,dest={}", place.dir.join("image.tar").display());
    let args = ["build", "--progress", "plain", "-o", output.as_str()];
    let ran = match kind {
        Kind::Directory => {
            let context = place.context("context", files);
            for (name, target) in links {
                symlink(target, context.join(name)).expect("ours");
            }
            run(place.command().args(args).arg(&context))
        }
        Kind::Archive => {
            let mut archive = Archive::default();
            for (name, content) in files {
                archive = archive.file(name, content);
            }
            for (name, target) in links {
                archive = archive.symlink(name, target);
            }
            let stdin = place.dir.file("context.tar", archive.end());
            let stdin = std::fs::File::open(stdin).expect("just written");
            run_reading(place.command().args(args).arg("-"), stdin.into())
        }
        Kind::Git => {
            let web = Web::start();
            let repository = web.repository("strange");
            for (name, target) in links {
                symlink(target, repository.path.join(name)).expect("ours");
            }
            repository.commit("links", files);
            let url = format!("{}/strange/.git", web.url);
            run(place.command().args(args).arg(url))
        }
    };
    let told = format!("{}{}", ran.stdout, ran.stderr);
    assert!(!told.contains(SONG), "{told}");
    assert!(ran.status.code().is_some(), "{told}");
    (place, ran.status.success())
}

#[test]
fn security_s04_links_of_a_context_lead_out_of_none() {
    use crate::support::programs;
    needs!(programs(&["git"]));
    let canary = Canary::new();
    let absolute = canary.path().join("secret").display().to_string();
    let climb = format!("{}/secret", canary.climb());
    // A file of this machine that is a Dockerfile, and one that hides everything.
    let outside = crate::support::dir::TestDir::new("outside");
    let dockerfile = outside.file("Dockerfile", "FROM scratch\nCOPY a /\n");
    let dockerfile = dockerfile.display().to_string();
    let hides = outside.file("hides", "**\n");
    for kind in [Kind::Directory, Kind::Archive, Kind::Git] {
        let fails = |files: &[(&str, &str)], links: &[(&str, &str)]| {
            let (_, succeeded) = build_with_links(&kind, files, links);
            assert!(!succeeded, "{files:?} {links:?}");
        };
        let hides = hides.display().to_string();
        for target in [&dockerfile, &absolute, &climb, &"/etc/passwd".to_owned()] {
            fails(&[("a", "")], &[("Dockerfile", target)]);
        }
        // Rules that would hide what is copied are not read.
        for target in [&hides, &absolute, &climb] {
            let (_, succeeded) = build_with_links(
                &kind,
                &[("Dockerfile", COPIES)],
                &[(".dockerignore", target)],
            );
            assert!(succeeded, "{target}");
        }
        for target in [&absolute, &climb, &"/etc/passwd".to_owned()] {
            let copy = [("Dockerfile", "FROM scratch\nCOPY stolen /\n")];
            fails(&copy, &[("stolen", target)]);
            let add = [("Dockerfile", "FROM scratch\nADD stolen /\n")];
            fails(&add, &[("stolen", target)]);
        }
        let parent = canary.path().display().to_string();
        for instruction in ["COPY out/secret /", "COPY ../../../../../secret /"] {
            let text = format!("FROM scratch\n{instruction}\n");
            fails(&[("Dockerfile", &text)], &[("out", &parent)]);
        }
        // A wildcard matches nothing there.
        let files = [("Dockerfile", "FROM scratch\nCOPY out/s* Dockerfile /\n")];
        let (place, succeeded) = build_with_links(&kind, &files, &[("out", &parent)]);
        assert!(succeeded);
        let image = place.archive(&place.dir.join("image.tar"));
        let names = image.layers[0].entries.iter().map(|e| e.path.as_str());
        assert_eq!(names.collect::<Vec<_>>(), ["Dockerfile"]);
        // A link that is copied with what is around it stays one.
        let files = [("Dockerfile", "FROM scratch\nCOPY . /all/\n")];
        let (place, succeeded) = build_with_links(&kind, &files, &[("out", &parent)]);
        assert!(succeeded);
        let image = place.archive(&place.dir.join("image.tar"));
        canary.is_not_in(&image, "a link that is copied");
        assert_eq!(image.entry("all/out").expect("it is there").link, parent);
    }
    canary.is_untouched("contexts");
}

#[test]
fn security_s04_mounts_of_a_context_show_nothing_outside() {
    let canary = Canary::new();
    let (path, climb) = (canary.path(), canary.climb());
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        for (number, source) in ["out", "out/dir", "climb", "../../../.."]
            .iter()
            .enumerate()
        {
            let dockerfile = format!(
                "FROM busybox\nRUN --mount=source={source},target=/m,rw \
                 cat /m/secret /m/*/secret; echo dead > /m/secret; true\n"
            );
            let context = place.context(&format!("{number}"), &[("Dockerfile", &dockerfile)]);
            symlink(path, context.join("out")).expect("ours");
            symlink(&climb, context.join("climb")).expect("ours");
            let ran = rung
                .build(&place, upstream, &context, &[])
                .does_not_say(SONG);
            assert_eq!(ran.status.success(), *source == "../../../..", "{source}");
            canary.is_untouched(rung.name);
        }
    });
}

#[test]
fn security_s05_addresses_of_repositories_start_nothing_and_lead_nowhere() {
    let upstream = upstream!();
    let place = Place::new();
    let canary = Canary::new();
    let started = place.dir.join("started");
    let touch = format!("touch {}", started.display());
    // A user's settings that would have git start programs, were they read.
    place.dir.file(
        "home/.gitconfig",
        format!(
            "[core]\n\thooksPath = {hooks}\n\tsshCommand = {touch}\n\tfsmonitor = {touch}\n\
             [protocol]\n\tallow = always\n[credential]\n\thelper = \"!{touch}\"\n\
             [filter \"evil\"]\n\tsmudge = {touch}\n\tclean = {touch}\n",
            hooks = place.dir.join("hooks").display()
        ),
    );
    for hook in ["post-checkout", "post-merge", "reference-transaction"] {
        use std::os::unix::fs::PermissionsExt as _;
        let hook = place
            .dir
            .file(&format!("hooks/{hook}"), format!("#!/bin/sh\n{touch}\n"));
        std::fs::set_permissions(hook, std::fs::Permissions::from_mode(0o755)).expect("ours");
    }
    let web = Web::start();
    let repository = web.repository("r");
    symlink(canary.path(), repository.path.join("out")).expect("ours");
    repository.commit(
        "first",
        &[
            ("Dockerfile", "FROM scratch\nCOPY . /\n"),
            (".gitattributes", "* filter=evil\n"),
            ("a", "text"),
        ],
    );
    let url = format!("{}/r/.git", web.url);
    let add = |source: &str| {
        let dockerfile = format!("FROM scratch\nADD [\"{source}\", \"/r/\"]\n");
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        place.build(&upstream, &context, &[])
    };
    let whole = |address: &str| {
        run(place
            .command()
            .args(["build", "--progress", "plain", address]))
    };
    whole(&url).success();
    add(&url).success();
    let local = canary.path().display();
    for reference in [
        format!("{url}#--upload-pack={touch}"),
        format!("{url}#-c"),
        format!("{url}#main:../../../..{local}"),
        format!("{url}#main:/../{local}"),
        format!("{url}#main:out"),
        format!("{url}#main:out/dir"),
        format!("ext::sh -c {touch}"),
        format!("ext::sh -c {touch}.git"),
        format!("file://{local}/.git"),
        format!("file::{local}.git"),
        format!("ssh://-oProxyCommand={touch}/r.git"),
        format!("git@-oProxyCommand={touch}:r.git"),
        format!("git://-oProxyCommand={touch}/r.git"),
        "--upload-pack=x.git".to_owned(),
        "http://127.0.0.1:1/bundle::x.git#--".to_owned(),
    ] {
        add(&reference).failure();
        whole(&reference).failure();
        assert!(!started.exists(), "{reference}");
    }
    assert!(!started.exists());
    canary.is_untouched("addresses");
}

/// CVE-2023-26054: who may read an image or a log learns no password from it.
#[test]
fn security_s05_passwords_in_addresses_stay_out_of_everything() {
    let upstream = upstream!();
    let place = Place::new();
    let web = Web::start();
    let commit = web.repository("r").commit(
        "first",
        &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")],
    );
    let file = web.file("/file", &[], "text");
    let secret = "pa55word-4c1f";
    let with = |url: &str| url.replace("http://", &format!("http://someone:{secret}@"));
    let (git, file) = (with(&format!("{}/r/.git", web.url)), with(&file));
    let check = |context: &str, args: &[&str]| {
        let (archive, metadata) = (place.dir.join("image.tar"), place.dir.join("metadata"));
        for progress in ["plain", "rawjson"] {
            let ran = run(place
                .command()
                .args([
                    "build",
                    "--no-cache",
                    "--explain",
                    "--progress",
                    progress,
                    "--metadata-file",
                ])
                .arg(&metadata)
                .args([
                    "-o",
                    &format!("type=oci,tar=true,dest={}", archive.display()),
                ])
                .args(args)
                .arg(context));
            for text in [&ran.stdout, &ran.stderr] {
                assert!(!text.contains(secret), "{text}");
            }
            if ran.status.success() {
                let image = place.archive(&archive);
                let told = format!("{} {}", image.config, image.manifest);
                assert!(!told.contains(secret), "{told}");
                let metadata = std::fs::read_to_string(&metadata).expect("written");
                assert!(!metadata.contains(secret), "{metadata}");
            }
        }
    };
    check(&git, &[]);
    check(&format!("{git}#{commit}"), &[]);
    check(&format!("{git}#absent"), &[]);
    check(&format!("{git}#main:absent"), &[]);
    check(&with("http://127.0.0.1:1/absent.git"), &[]);
    check(&with(&format!("{}/absent/.git", web.url)), &[]);
    let named = [
        format!("src={git}"),
        format!("b={}", with("http://127.0.0.1:1/x.git")),
    ];
    for (dockerfile, args) in [
        (
            format!("FROM scratch\nADD {git} /r/\nADD {file} /f\n"),
            vec![],
        ),
        (format!("FROM scratch\nADD {git}#absent /r/\n"), vec![]),
        (format!("FROM scratch\nADD {file}-absent /f\n"), vec![]),
        (
            "FROM scratch\nCOPY --from=src . /\n".to_owned(),
            vec!["--build-context", named[0].as_str()],
        ),
        (
            "FROM scratch\nCOPY --from=b . /\n".to_owned(),
            vec!["--build-context", named[1].as_str()],
        ),
    ] {
        let context = place.context("context", &[("Dockerfile", &dockerfile)]);
        check(context.to_str().expect("ours"), &args);
    }
    drop(upstream);
    // Nor do the records of the cache have it.
    let store = place.dir.join("store");
    let found = run(std::process::Command::new("grep")
        .args(["--recursive", "--text", "--files-with-matches", secret])
        .arg(store));
    assert_eq!((found.status.code(), found.stdout.as_str()), (Some(1), ""));
}
