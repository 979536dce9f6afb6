//! What steps read of a context: every change is seen, and nothing of it can be changed.

use std::fs;
use std::path::Path;

use crate::support::process::{Ran, run};
use crate::support::sockless::Place;
use crate::support::{images, namespaces};

/// Builds the context into the directory `out` beside it.
#[track_caller]
fn build(place: &Place, context: &Path) -> (Ran, std::path::PathBuf) {
    let out = context.with_extension("out");
    let _ = fs::remove_dir_all(&out);
    let output = format!("type=local,dest={}", out.display());
    let ran = run(place
        .command()
        .args(["build", "--progress", "plain", "-o", &output])
        .arg(context));
    (ran.success(), out)
}

#[test]
fn sandbox_a_context_is_hashed_once_and_every_change_is_seen() {
    needs!(namespaces());
    let place = Place::new();
    let files = [
        ("Dockerfile", "FROM scratch\nCOPY . /\n"),
        (".dockerignore", "Dockerfile\n"),
        ("a", "one"),
        ("b", "bee"),
    ];
    let context = place.context("context", &files);
    let a = context.join("a");
    let (ran, out) = build(&place, &context);
    ran.does_not_say("CACHED");
    assert_eq!(fs::read_to_string(out.join("a")).expect("built"), "one");
    build(&place, &context).0.says("CACHED");

    // Touched, and the same.
    let was = fs::metadata(&a).expect("ours").modified().expect("a time");
    let touch = |time| {
        let file = fs::File::options().append(true).open(&a).expect("ours");
        file.set_modified(time).expect("ours");
    };
    touch(std::time::SystemTime::UNIX_EPOCH);
    build(&place, &context).0.says("CACHED");
    touch(was);
    build(&place, &context).0.says("CACHED");

    // Changed, with size and time as they were.
    fs::write(&a, "two").expect("ours");
    touch(was);
    let (ran, out) = build(&place, &context);
    ran.does_not_say("CACHED");
    assert_eq!(fs::read_to_string(out.join("a")).expect("built"), "two");
    fs::write(&a, "one").expect("ours");
    touch(was);
    let (ran, out) = build(&place, &context);
    ran.says("CACHED");
    assert_eq!(fs::read_to_string(out.join("a")).expect("built"), "one");

    // Damaged caches are none.
    let caches = place.dir.join("store/cache/stat");
    for cache in fs::read_dir(&caches).into_iter().flatten().flatten() {
        fs::write(cache.path(), "not a cache").expect("ours");
    }
    build(&place, &context).0.says("CACHED");
}

#[test]
fn sandbox_steps_share_the_files_of_a_context_and_cannot_change_them() {
    needs!(namespaces());
    let upstream = match images::busybox() {
        Ok(registry) => registry,
        Err(reason) => skip!("{reason}"),
    };
    let place = Place::new();
    let dockerfile = "FROM busybox\n\
        RUN --mount=target=/c cat /c/d/a && stat -c '%u:%g' /c/d/a && ls /c && \
        ! touch /c/new && ! sh -c 'echo x > /c/d/a'\n\
        RUN --mount=target=/c,rw echo changed > /c/d/a && touch /c/new && cat /c/d/a\n\
        RUN --mount=target=/c test ! -e /c/new && echo \"still $(cat /c/d/a)\"\n";
    let files = [
        ("Dockerfile", dockerfile),
        (".dockerignore", "Dockerfile\nhidden\n"),
        ("d/a", "as it was\n"),
        ("hidden", "x"),
    ];
    let context = place.context("context", &files);
    let ran = place.build(&upstream, &context, &[]);
    ran.success()
        .says("0:0")
        .says("changed")
        .says("still as it was")
        .does_not_say("hidden\n");
    let kept = fs::read_to_string(context.join("d/a")).expect("ours");
    assert_eq!(kept, "as it was\n");
    assert!(!context.join("new").exists());
}
