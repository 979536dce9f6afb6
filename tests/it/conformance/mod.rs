//! The cases of `fixtures/conformance`: the program's images and refusals beside BuildKit's.
//!
//! `make conformance` shows them as a table. Variables: `SOCKLESS_CONFORMANCE_CASES` (beginnings of
//! names, the cases to run instead of all), `SOCKLESS_CONFORMANCE_TABLE=1` (a row for each case on
//! standard output, behind `| `), `SOCKLESS_ROOTFS` (as for the program), `SOCKLESS_REGENERATE` (writes `expected.json` of the cases in `own/`:
//! `1` of all, `missing` of those that have none).

mod bases;
mod case;
mod expected;
mod flatten;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::bases::Bases;
use self::case::{Case, Expect, Spec};
use crate::support::dir::TestDir;
use crate::support::oci::Image;
use crate::support::process::{Ran, run};
use crate::support::sockless::Place;
use crate::support::{is_root, namespaces, programs, repository, unshared};

/// How many cases are built at the same time: more than cores, as they wait for the disk too.
const WORKERS: usize = 4;

/// How a case went.
#[derive(Clone, Debug)]
enum Outcome {
    Passed,
    /// Passed, and `expected.json` was written; what changed in it.
    Written(String),
    /// Why it cannot run here.
    Skipped(String),
    /// Every difference.
    Failed(Vec<String>),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Written(changes) => write!(f, "passed   {changes}"),
            Self::Skipped(reason) => write!(f, "skipped  {reason}"),
            Self::Failed(differences) => write!(f, "FAILED   {}", differences.join("; ")),
        }
    }
}

/// When `expected.json` of our own cases is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Regenerate {
    Nothing,
    Missing,
    All,
}

#[test]
fn sandbox_every_case_gives_what_buildkit_gives() {
    needs!(
        programs(&["skopeo", "busybox", "tar"]),
        crate::support::images::registry_present(),
        namespaces()
    );
    let directory = repository().join("fixtures/conformance");
    let cases = selected(&directory);
    let suite = Suite::new(&directory);
    let table = variable("SOCKLESS_CONFORMANCE_TABLE") == "1";
    let width = cases.iter().map(|case| case.name.len()).max().unwrap_or(0);
    let mut report = Report::default();
    if table {
        // The name of the test may stand on this line already.
        show("\n");
    }
    suite.run(&cases, |case, outcome, took| {
        if table {
            show(&row(&format!("{:width$}  {outcome}", case.name)));
        }
        report.add(case, outcome, took);
    });
    if table {
        show(&format!("| {}\n", report.total()));
    }
    eprintln!("{}", report.details());
    assert!(report.failed.is_empty(), "{}", report.total());
}

/// Cases with steps, of what layers say of files and of mounts: they are run on copies too.
const ON_COPIES: [&str; 5] = ["30", "31", "33", "34", "40"];

#[test]
fn sandbox_steps_on_copies_give_what_buildkit_gives() {
    needs!(
        programs(&["skopeo", "busybox", "tar"]),
        crate::support::images::registry_present(),
        namespaces()
    );
    let directory = repository().join("fixtures/conformance");
    let mut cases = Case::all(&directory.join("cases"), false).expect("the cases can be read");
    cases.retain(|case| {
        ON_COPIES
            .iter()
            .any(|beginning| case.begins_with(beginning))
    });
    let suite = Suite {
        rootfs: Some("copy"),
        regenerate: Regenerate::Nothing,
        ..Suite::new(&directory)
    };
    let mut report = Report::default();
    suite.run(&cases, |case, outcome, took| {
        report.add(case, outcome, took)
    });
    eprintln!("{}", report.details());
    assert!(report.failed.is_empty(), "{}", report.total());
    assert!(cases.len() >= 40, "{}", cases.len());
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// Writes past the capture of the test harness.
fn show(text: &str) {
    // Nobody need be told that nobody listens.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// A row of the table: one line, of a length that can be read.
fn row(text: &str) -> String {
    const WIDTH: usize = 400;
    let line: String = text.replace('\n', " ⏎ ");
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("| {}…\n", &line[..end]),
        None => format!("| {line}\n"),
    }
}

/// The cases that `SOCKLESS_CONFORMANCE_CASES` names, or all.
fn selected(directory: &Path) -> Vec<Case> {
    let mut cases = Case::all(&directory.join("cases"), false).expect("the cases can be read");
    cases.extend(Case::all(&directory.join("own"), true).expect("the cases can be read"));
    let wanted = variable("SOCKLESS_CONFORMANCE_CASES");
    let beginnings: Vec<&str> = wanted.split_whitespace().collect();
    for beginning in &beginnings {
        assert!(
            cases.iter().any(|case| case.begins_with(beginning)),
            "no case begins with {beginning}"
        );
    }
    cases.retain(|case| beginnings.is_empty() || beginnings.iter().any(|b| case.begins_with(b)));
    cases
}

#[derive(Debug, Default)]
struct Report {
    passed: usize,
    skipped: Vec<String>,
    failed: Vec<String>,
    written: Vec<String>,
    took: Vec<(Duration, String)>,
}

impl Report {
    fn add(&mut self, case: &Case, outcome: &Outcome, took: Duration) {
        let name = &case.name;
        self.took.push((took, name.clone()));
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Written(changes) => {
                self.passed += 1;
                self.written.push(format!("{name}: {changes}"));
            }
            Outcome::Skipped(reason) => self.skipped.push(format!("skipped: {name}: {reason}")),
            Outcome::Failed(differences) => self
                .failed
                .push(format!("{name}\n    {}", differences.join("\n    "))),
        }
    }

    fn total(&self) -> String {
        let skipped = match self.skipped.len() {
            0 => String::new(),
            some => format!(", {some} skipped"),
        };
        format!(
            "{} passed, {} failed{skipped}",
            self.passed,
            self.failed.len()
        )
    }

    fn details(&self) -> String {
        let mut slowest = self.took.clone();
        slowest.sort();
        let slowest: Vec<String> = (slowest.iter().rev().take(5))
            .map(|(took, name)| format!("{name} {:.1} s", took.as_secs_f64()))
            .collect();
        [
            self.failed.as_slice(),
            &self.written,
            &self.skipped,
            &[format!("slowest: {}", slowest.join(", "))],
        ]
        .concat()
        .join("\n")
    }
}

/// What all cases share: the images, and what this machine and this user can do.
#[derive(Debug)]
struct Suite {
    bases: Bases,
    place: Place,
    /// `--rootfs` of all builds, where it is not the default.
    rootfs: Option<&'static str>,
    /// What `requires` may name, and why it is missing here.
    missing: BTreeMap<&'static str, Option<Missing>>,
    regenerate: Regenerate,
}

/// An ability that is missing.
#[derive(Clone, Debug)]
struct Missing {
    reason: String,
    /// No setting of the machine would give it to this user; to root perhaps.
    by_nature: bool,
}

impl Missing {
    /// Where everything has to run, an ordinary user's run may leave out only what root alone can do,
    /// and only if root's run follows, which `SOCKLESS_TEST_ROOT_FOLLOWS=1` says.
    fn outcome(&self) -> Outcome {
        let excused = self.by_nature && variable("SOCKLESS_TEST_ROOT_FOLLOWS") == "1";
        if variable("SOCKLESS_TEST_REQUIRE_ALL") == "1" && !excused {
            return Outcome::Failed(vec![format!(
                "cannot run here, and SOCKLESS_TEST_REQUIRE_ALL=1 demands every case: {}",
                self.reason
            )]);
        }
        Outcome::Skipped(self.reason.clone())
    }
}

impl Suite {
    fn new(directory: &Path) -> Self {
        let bases =
            Bases::new(&directory.join("base")).expect("the fixture images can be made and served");
        let missing = BTreeMap::from([
            ("mknod", device_nodes()),
            ("large-ids", large_ids()),
            ("capability-xattr", capabilities(&bases.layer)),
        ]);
        Self {
            bases,
            place: Place::new(),
            rootfs: None,
            missing,
            regenerate: match variable("SOCKLESS_REGENERATE").as_str() {
                "" | "0" => Regenerate::Nothing,
                "1" => Regenerate::All,
                "missing" => Regenerate::Missing,
                other => panic!("SOCKLESS_REGENERATE={other:?}, want 1 or missing"),
            },
        }
    }

    /// Runs the cases, several at a time, and tells of them in their order.
    fn run(&self, cases: &[Case], mut tell: impl FnMut(&Case, &Outcome, Duration)) {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (sender, results) = mpsc::channel();
            for _ in 0..WORKERS {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(case) = cases.get(at) else { break };
                        let start = Instant::now();
                        let outcome = self.outcome(case);
                        if sender.send((at, outcome, start.elapsed())).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let mut waiting = BTreeMap::new();
            let mut told = 0;
            for (at, outcome, took) in results {
                waiting.insert(at, (outcome, took));
                while let Some((outcome, took)) = waiting.remove(&told) {
                    tell(&cases[told], &outcome, took);
                    told += 1;
                }
            }
        });
    }

    fn outcome(&self, case: &Case) -> Outcome {
        // A step that never ends fails its case, not all that would come after it.
        match catch_unwind(AssertUnwindSafe(|| self.judge(case))) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(wrong)) => Outcome::Failed(vec![wrong]),
            Err(panic) => {
                let text = (panic.downcast_ref::<String>().map(String::as_str))
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                Outcome::Failed(vec![text.unwrap_or("the test panicked").to_owned()])
            }
        }
    }

    fn judge(&self, case: &Case) -> Result<Outcome, String> {
        let spec = case.spec()?;
        for ability in &spec.requires {
            match self.missing.get(ability.as_str()) {
                Some(None) => {}
                Some(Some(missing)) => return Ok(missing.outcome()),
                None => return Err(format!("case.json: unknown ability {ability}")),
            }
        }
        let expected = case.directory.join("expected.json");
        let stored = std::fs::read_to_string(&expected).ok();
        let regenerate = case.own
            && match self.regenerate {
                Regenerate::Nothing => false,
                Regenerate::Missing => stored.is_none(),
                Regenerate::All => true,
            };
        let work = TestDir::new("case");
        let copy = work.join("case");
        case.stage(&copy)?;
        let mut written = Outcome::Passed;
        // Unpacked bases are shared, through the place's store; what steps keep is not: cache mounts
        // have to be empty.
        for turn in 0..spec.builds() {
            let output = work.dir(&format!("output{turn}"));
            let archive = output.join("image.tar");
            let mut command = self.place.command();
            if let Some(rootfs) = self.rootfs {
                command.env("SOCKLESS_ROOTFS", rootfs);
            }
            if case.own || spec.mentions_cache(&copy) {
                command.env("SOCKLESS_ROOT", work.dir("store"));
            }
            let ran = spec.build(command, &copy, &archive, &self.bases)?;
            let result = Built::new(&spec, &ran, &archive, &self.bases)?;
            if regenerate && turn == 0 {
                let text = expected::render(&result.describe(&spec));
                std::fs::write(&expected, &text).map_err(|e| format!("expected.json: {e}"))?;
                written = match &stored {
                    Some(before) if *before == text => Outcome::Passed,
                    before => Outcome::Written(changes(before.as_deref(), &text)),
                };
            }
            let text = std::fs::read_to_string(&expected)
                .map_err(|e| format!("expected.json: {e} (SOCKLESS_REGENERATE writes our own)"))?;
            let want: Value =
                serde_json::from_str(&text).map_err(|e| format!("expected.json: {e}"))?;
            let differences = result.differences(&spec, &want);
            if !differences.is_empty() {
                return Ok(Outcome::Failed(differences));
            }
        }
        Ok(written)
    }
}

/// How a build ended.
#[derive(Debug)]
enum Built {
    /// What `expected.json` would say of the image.
    Image(Value),
    /// The exit status and standard error.
    Failure(Option<i32>, String),
}

impl Built {
    /// # Errors
    /// A build that did not end as the case says, or not properly.
    fn new(spec: &Spec, ran: &Ran, archive: &Path, bases: &Bases) -> Result<Self, String> {
        let expect = spec.expect.ok_or("case.json: no \"expect\"")?;
        match (expect, ran.status.success()) {
            (Expect::Image, true) => {
                let image = read(archive)?;
                let base = bases.get(&spec.base)?;
                Ok(Self::Image(expected::of_image(&image, &base, spec)?))
            }
            (Expect::Error, false) => {
                let output = archive.parent().expect("a file in a directory");
                let left: Vec<_> = std::fs::read_dir(output)
                    .map_err(|e| e.to_string())?
                    .filter_map(|entry| Some(entry.ok()?.file_name()))
                    .collect();
                if !left.is_empty() {
                    return Err(format!("a build that failed left {left:?} behind"));
                }
                Ok(Self::Failure(ran.status.code(), ran.stderr.clone()))
            }
            (Expect::Image, false) => Err(format!(
                "{}: {}",
                ran.status,
                last_lines(&expected::message(&ran.stderr))
            )),
            (Expect::Error, true) => Err("built, but should have been refused".into()),
        }
    }

    fn describe(&self, spec: &Spec) -> Value {
        match self {
            Self::Image(image) => image.clone(),
            Self::Failure(_, stderr) => expected::of_failure(stderr, spec),
        }
    }

    fn differences(&self, spec: &Spec, want: &Value) -> Vec<String> {
        match self {
            Self::Image(image) => expected::differences(image, want),
            Self::Failure(code, stderr) => {
                expected::failure_differences(stderr, *code, want, spec.dockerfile_name())
            }
        }
    }
}

/// Reads the image of an OCI archive.
fn read(archive: &Path) -> Result<Image, String> {
    let layout = archive.with_extension("layout");
    let file = std::fs::File::open(archive).map_err(|e| format!("the image: {e}"))?;
    tar::Archive::new(file)
        .unpack(&layout)
        .map_err(|e| format!("the image: {e}"))?;
    Image::try_read(&layout)
}

/// The end of a log, where the error stands.
fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// The lines that a file lost and won.
fn changes(before: Option<&str>, after: &str) -> String {
    let Some(before) = before else {
        return "expected.json is new".into();
    };
    let only = |sign: char, text: &str, other: &str| -> Vec<String> {
        let other: Vec<&str> = other.lines().collect();
        (text.lines())
            .filter(|line| !other.contains(line))
            .map(|line| format!("{sign}{}", line.trim()))
            .collect()
    };
    let changes = [only('-', before, after), only('+', after, before)].concat();
    format!("expected.json changed: {}", changes.join(" "))
}

/// Whether steps can make device nodes: root's own, where it has the capability.
fn device_nodes() -> Option<Missing> {
    if !is_root() {
        return Some(Missing {
            reason: "device nodes cannot be made in a user namespace".into(),
            by_nature: true,
        });
    }
    let dir = TestDir::new("mknod");
    let made = run(Command::new("mknod")
        .arg(dir.join("null"))
        .args(["c", "1", "3"]));
    (!made.status.success()).then(|| Missing {
        reason: format!("device nodes cannot be made: {}", made.stderr.trim()),
        by_nature: false,
    })
}

/// Whether files can be given to users up to 4000000.
fn large_ids() -> Option<Missing> {
    const HIGHEST: u64 = 4_000_000;
    // An ordinary user has the subordinate IDs, and the own one in front of them.
    let map = run(&mut unshared(
        &[],
        "cat /proc/self/uid_map /proc/self/gid_map",
    ));
    let reach = |line: &str| -> Option<u64> {
        let mut numbers = line.split_whitespace().map(|n| n.parse::<u64>().ok());
        let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some(first + count)
    };
    let reached = map.stdout.lines().filter_map(reach);
    // Both maps have to reach it, so twice.
    let enough = reached.filter(|end| *end > HIGHEST).count() >= 2;
    (!enough).then(|| Missing {
        reason: format!("this user has no numbers up to {HIGHEST}"),
        by_nature: !is_root(),
    })
}

/// Whether `security.capability` can be stored on files here.
fn capabilities(layer: &[u8]) -> Option<Missing> {
    let dir = TestDir::new("capability");
    dir.file("layer.tar", layer);
    // GNU tar only warns where it cannot.
    let script = "umask 022; exec tar -x --xattrs --xattrs-include=security.capability \
                  -C \"$DIR\" -f \"$DIR/layer.tar\" opt/capable";
    let ran = run(unshared(&[], script).env("DIR", dir.path()));
    let stored = ran.status.success() && ran.stderr.is_empty();
    (!stored).then(|| Missing {
        reason: format!(
            "security.capability cannot be stored: {}",
            ran.stderr.trim()
        ),
        by_nature: false,
    })
}
