//! S13: where a secret that was lent to a step is found again.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;

use crate::support::oci::hex;
use crate::support::process::{Ran, run};
use crate::support::rungs::on_every_rung;
use crate::support::sockless::Place;

/// With what shells, JSON and regular expressions treat specially, and a line break.
const SECRET: &str = "s3cret\"tok\\en/+=ü-0a1b2c3d\nsecond-line-9f8e7d6c";
/// A variable, as CI systems have them.
const TOKEN: &str = "ghp_canary0123456789abcdef";

/// All texts that would give a secret away.
fn forms() -> Vec<String> {
    let base64 = &base64::engine::general_purpose::STANDARD;
    let mut forms = Vec::new();
    for secret in [SECRET, TOKEN] {
        let escaped = serde_json::Value::from(secret).to_string();
        forms.extend([
            base64.encode(secret),
            // The same at other places of a longer text: less the characters that neighbours share.
            base64.encode(format!("x{secret}"))[2..]
                .trim_end_matches('=')
                .to_owned(),
            base64.encode(format!("xy{secret}"))[3..]
                .trim_end_matches('=')
                .to_owned(),
            hex(secret.as_bytes()),
            escaped.trim_matches('"').to_owned(),
        ]);
        forms.extend(secret.lines().map(str::to_owned));
    }
    // The last characters depend on what follows.
    for form in &mut forms {
        if form.len() > 24 {
            let end = (form.len() - 4..=form.len()).find(|end| form.is_char_boundary(*end));
            form.truncate(end.unwrap_or(form.len()));
        }
    }
    forms
}

/// Fails the test where a text gives a secret away.
#[track_caller]
fn is_clean(text: &[u8], what: &str) {
    for form in forms() {
        let found = text
            .windows(form.len())
            .position(|at| at == form.as_bytes());
        assert!(
            found.is_none(),
            "{form:?} is in {what}: {}",
            String::from_utf8_lossy(text)
        );
    }
}

/// Fails the test where a file below a directory gives a secret away, compressed or not.
#[track_caller]
fn are_clean(dir: &Path) {
    let list = run(Command::new("find").arg(dir).args(["-type", "f"])).success();
    let mut count = 0;
    for path in list.stdout.lines() {
        count += 1;
        let bytes = std::fs::read(path).expect("a file of ours, or root reads it");
        let mut plain = Vec::new();
        use std::io::Read as _;
        if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut gzip = flate2::read::MultiGzDecoder::new(&bytes[..]);
            gzip.read_to_end(&mut plain).expect("gzip");
        }
        is_clean(&bytes, path);
        is_clean(&plain, path);
    }
    assert!(count > 5, "{count} files below {}", dir.display());
}

fn told(ran: &Ran) -> String {
    format!("{}\n{}", ran.stdout, ran.stderr)
}

#[test]
fn security_s13_secrets_are_found_nowhere_again() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        // Outside of all that is looked through.
        let secret = crate::support::dir::TestDir::new("secret");
        let file = secret.file("file", SECRET);
        let arguments = [
            "--secret".to_owned(),
            format!("id=file,src={}", file.display()),
            "--secret".to_owned(),
            "id=token,env=CI_TOKEN".to_owned(),
        ];
        // It is used in all ways, written nowhere, and shown in the log by mistake.
        let dockerfile = "FROM busybox AS made\n\
             RUN --mount=type=secret,id=file --mount=type=secret,id=token,env=TOKEN \
             --mount=type=cache,target=/cache \
             test \"$(wc -c < /run/secrets/file)\" -gt 20 && test -n \"$TOKEN\" && \
             cp /run/secrets/file /dev/shm/copy && echo made > /made && echo kept > /cache/kept\n\
             RUN --mount=type=secret,id=file,target=/etc/token --mount=type=tmpfs,target=/t cp /etc/token /t/x\n\
             RUN --mount=type=secret,id=token,env=TOKEN sh -c 'echo \"token: $TOKEN\"; env' && test -e /made\n\
             FROM busybox\nCOPY --from=made /made /made\n";
        let context = place.context("context", &[("Dockerfile", dockerfile)]);
        let out = place.dir.dir("outputs");
        let at = |name: &str| out.join(name).display().to_string();
        let outputs = [
            format!("type=oci,tar=false,dest={}", at("layout")),
            format!("type=docker,dest={}", at("docker.tar")),
            format!("type=tar,dest={}", at("root.tar")),
            at("files"),
        ];
        for progress in ["plain", "rawjson"] {
            let mut command = rung.command(&place, upstream);
            command
                .env("CI_TOKEN", TOKEN)
                .args(&arguments)
                .args([
                    "--progress",
                    progress,
                    "--no-cache",
                    "--explain",
                    "--metadata-file",
                    &at("metadata"),
                ])
                .arg("--cache-to")
                .arg(format!("type=local,mode=max,dest={}", at("cache")));
            for output in &outputs {
                command.args(["-o", output]);
            }
            let ran = run(command.arg(&context)).success();
            is_clean(told(&ran).as_bytes(), "the log");
            assert!(told(&ran).contains("token: ***"), "{}", told(&ran));
        }
        are_clean(&out);
        let store = place.dir.join("store");
        let grep =
            crate::support::unshared(&[], "chmod -R a+rX \"$DIR\" && cp -r \"$DIR\" \"$TO\"");
        let copy = place.dir.join("copy");
        let mut grep = grep;
        run(grep.env("DIR", &store).env("TO", &copy)).success();
        are_clean(&copy);
    });
}

#[test]
fn security_s13_what_fails_does_not_tell_either() {
    on_every_rung(|rung, upstream| {
        let place = Place::new();
        let secret = place.dir.file("file", SECRET);
        for command in [
            "cat /run/secrets/file; exit 7",
            "tr '\\n' ' ' < /run/secrets/file >&2; exit 7",
            "echo $TOKEN | head -c 10; sleep 0.1; echo $TOKEN | tail -c +11; exit 7",
            "for n in 1 2 3 4; do printf '%s' $TOKEN; done; exit 7",
            "cat /run/secrets/$TOKEN",
            "$TOKEN",
        ] {
            let dockerfile = format!(
                "FROM busybox\nRUN --mount=type=secret,id=file \
                 --mount=type=secret,id=token,env=TOKEN {command}\n"
            );
            let context = place.context("context", &[("Dockerfile", &dockerfile)]);
            for progress in ["plain", "rawjson", "quiet"] {
                let mut command = rung.command(&place, upstream);
                command
                    .env("CI_TOKEN", TOKEN)
                    .args([
                        "--progress",
                        progress,
                        "--secret",
                        "id=token,env=CI_TOKEN",
                        "--secret",
                    ])
                    .arg(format!("id=file,src={}", secret.display()));
                let ran = run(command.arg(&context)).failure();
                assert_eq!(ran.status.code(), Some(1), "{ran:?}");
                is_clean(told(&ran).as_bytes(), "the log");
                assert!(told(&ran).contains("***"), "{ran:?}");
            }
        }
    });
}
