//! `sockless prune`, `du`, `ls` and `store verify`: what the store has.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::request::{Machine, RequestError};
use super::values;
use crate::failure::Failure;
use crate::store::{Finding, Kind, Object, PruneOptions, Pruned, Store};

/// The exit code of `store verify` that found something that is still so.
const FOUND: u8 = 1;

/// How much of a description a line has.
const DESCRIPTION_LIMIT: usize = 60;

/// How much of an ID a line has, as everywhere in Docker's tools.
const ID_LIMIT: usize = 12;

/// Arguments that all have.
#[derive(Clone, Debug, Args)]
pub(super) struct Common {
    /// The store [env: SOCKLESS_ROOT] [default: /var/lib/sockless as root, else $XDG_DATA_HOME/sockless]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `sockless prune`, named as those of `docker buildx prune`.
#[derive(Clone, Debug, Args)]
pub(super) struct PruneArgs {
    #[command(flatten)]
    common: Common,

    /// Also removes files that ADD has fetched, and what servers said about them
    #[arg(short, long)]
    all: bool,

    /// Removes only what this is true of: until=24h (not used for so long),
    /// type=tree|blob|step|http|mount, id=PREFIX
    #[arg(long = "filter", value_name = "KEY=VALUE")]
    filters: Vec<String>,

    /// Removes the least recently used until the store takes at most so much
    #[arg(long, value_name = "SIZE")]
    max_used_space: Option<String>,

    /// Always keeps so much
    #[arg(long, visible_alias = "keep-storage", value_name = "SIZE")]
    reserved_space: Option<String>,

    /// Removes the least recently used until so much of the disk is free
    #[arg(long, value_name = "SIZE")]
    min_free_space: Option<String>,

    /// Removes nothing and says what it would
    #[arg(long)]
    dry_run: bool,

    /// Does not ask; nor does sockless without it
    #[allow(dead_code, reason = "accepted because scripts for buildx give it")]
    #[arg(short, long, hide = true)]
    force: bool,
}

/// Arguments of `sockless du`.
#[derive(Clone, Debug, Args)]
pub(super) struct DuArgs {
    #[command(flatten)]
    common: Common,

    /// Lists everything, not only the sums
    #[arg(short, long)]
    verbose: bool,
}

/// Arguments of `sockless ls`.
#[derive(Clone, Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    common: Common,
}

/// Arguments of `sockless store`.
#[derive(Clone, Debug, Args)]
pub(super) struct StoreArgs {
    #[command(subcommand)]
    command: StoreSubcommand,
}

#[derive(Clone, Debug, Subcommand)]
enum StoreSubcommand {
    /// Compares everything in the store with its name; exit code 1 if something is wrong
    Verify {
        #[command(flatten)]
        common: Common,

        /// Removes what is damaged
        #[arg(long)]
        repair: bool,
    },
}

/// What is done with the store.
#[derive(Debug)]
pub struct StoreCommand {
    root: PathBuf,
    json: bool,
    action: Action,
}

#[derive(Debug)]
enum Action {
    Prune(PruneOptions),
    Du { verbose: bool },
    Ls,
    Verify { repair: bool },
}

impl StoreCommand {
    pub(super) fn prune<E: Fn(&str) -> Option<OsString>>(
        args: PruneArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        let size = |name, text: Option<String>| {
            let bytes = text.map(|text| values::bytes(name, &text)).transpose()?;
            // As there: 0 is no amount.
            Ok::<_, RequestError>(bytes.filter(|bytes| *bytes > 0))
        };
        let mut options = PruneOptions {
            all: args.all,
            max_used_bytes: size("--max-used-space", args.max_used_space)?,
            reserved_bytes: size("--reserved-space", args.reserved_space)?,
            min_free_bytes: size("--min-free-space", args.min_free_space)?,
            dry_run: args.dry_run,
            ..PruneOptions::default()
        };
        for text in &args.filters {
            filter(&mut options, text, SystemTime::now())
                .ok_or_else(|| RequestError::Filter(text.clone()))?;
        }
        Self::new(args.common, Action::Prune(options), machine)
    }

    pub(super) fn du<E: Fn(&str) -> Option<OsString>>(
        args: DuArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        let verbose = args.verbose;
        Self::new(args.common, Action::Du { verbose }, machine)
    }

    pub(super) fn ls<E: Fn(&str) -> Option<OsString>>(
        args: LsArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        Self::new(args.common, Action::Ls, machine)
    }

    pub(super) fn store<E: Fn(&str) -> Option<OsString>>(
        args: StoreArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        let StoreSubcommand::Verify { common, repair } = args.command;
        Self::new(common, Action::Verify { repair }, machine)
    }

    fn new<E: Fn(&str) -> Option<OsString>>(
        common: Common,
        action: Action,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        Ok(Self {
            root: machine.root(common.root.as_deref())?,
            json: common.json,
            action,
        })
    }
}

/// Adds `--filter KEY=VALUE`; absent where it is none.
fn filter(options: &mut PruneOptions, text: &str, now: SystemTime) -> Option<()> {
    let (key, value) = text.split_once('=')?;
    match key {
        "until" => {
            let since = now.checked_sub(duration(value)?)?;
            let earlier = options.unused_since.replace(since);
            // All of them have to be true.
            options.unused_since = earlier.into_iter().chain([since]).min();
        }
        "type" => {
            let kinds = Kind::ALL.into_iter();
            match value {
                // BuildKit's words.
                "regular" => {
                    let kinds = [Kind::Tree, Kind::Blob, Kind::Step, Kind::Note];
                    options.kinds.extend(kinds);
                }
                "exec.cachemount" => drop(options.kinds.insert(Kind::Mount)),
                name => {
                    let kind = kinds.into_iter().find(|kind| kind.name() == name)?;
                    // Who asks for them by name wants them.
                    options.all |= kind == Kind::Http;
                    options.kinds.insert(kind);
                }
            }
        }
        "id" if options.id.is_none() && !value.is_empty() => options.id = Some(value.to_owned()),
        _ => return None,
    }
    Some(())
}

/// A duration such as `24h` or `2h30m`, as Go writes it.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut left = text;
    while !left.is_empty() {
        let end = left.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, rest) = left.split_at(end);
        let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, rest) = rest.split_at(unit_end.unwrap_or(rest.len()));
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 0.001,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        let part = Duration::try_from_secs_f64(number * seconds).ok()?;
        total = total.checked_add(part)?;
        left = rest;
    }
    (!text.is_empty()).then_some(total)
}

/// Does what is asked for and returns the exit code.
pub fn store(command: StoreCommand) -> u8 {
    match run(&command) {
        Ok((text, code)) => match print(&text) {
            Ok(()) => code,
            Err(error) => super::report(&error),
        },
        Err(error) => super::report(&Failure::with_disk_advice(error, &command.root)),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("printing"),
    }
}

fn run(command: &StoreCommand) -> anyhow::Result<(String, u8)> {
    let store = Store::open_existing(&command.root)?;
    let objects = |store: Option<&Store>| store.map_or(Ok(Vec::new()), Store::objects);
    let now = SystemTime::now();
    let root = command.root.display().to_string();
    let text = match &command.action {
        Action::Prune(options) => {
            let pruned = store.map_or(Ok(Pruned::default()), |store| store.prune(options))?;
            if command.json {
                pruned_json(&pruned, options.dry_run)
            } else {
                pruned_text(&pruned, options.dry_run, now)
            }
        }
        Action::Du { verbose } => {
            let mut objects = objects(store.as_ref())?;
            sort(&mut objects);
            if command.json {
                usage_json(&root, &objects, *verbose)
            } else {
                usage_text(&objects, *verbose, now)
            }
        }
        Action::Ls => {
            let objects = objects(store.as_ref())?;
            let steps = Step::all(&objects);
            if command.json {
                pretty(&Value::Array(steps.iter().map(Step::to_json).collect()))
            } else {
                steps_text(&steps, now)
            }
        }
        Action::Verify { repair } => {
            let is_there = store.is_some();
            let findings = store.map_or(Ok(Vec::new()), |store| store.verify(*repair))?;
            let is_sound = findings.iter().all(|finding| finding.repaired);
            let text = if command.json {
                findings_json(&root, &findings)
            } else if !is_there {
                format!("there is no store at {root}\n")
            } else {
                findings_text(&root, &findings)
            };
            return Ok((text, if is_sound { 0 } else { FOUND }));
        }
    };
    Ok((text, 0))
}

/// The most recently used last, where a terminal shows it.
fn sort(objects: &mut [Object]) {
    objects.sort_by(|a, b| {
        let key = |object: &Object| (object.last_used, object.kind);
        key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
    });
}

fn pruned_json(pruned: &Pruned, dry_run: bool) -> String {
    pretty(&json!({
        "dry_run": dry_run,
        "removed": pruned.removed.iter().map(object_json).collect::<Vec<_>>(),
        "reclaimed_bytes": pruned.bytes,
        "left_bytes": pruned.left_bytes,
    }))
}

fn pruned_text(pruned: &Pruned, dry_run: bool, now: SystemTime) -> String {
    let mut text = String::new();
    if !pruned.removed.is_empty() {
        let mut rows = vec![row(["ID", "KIND", "SIZE", "LAST USED", "DESCRIPTION"])];
        rows.extend(pruned.removed.iter().map(|object| object_row(object, now)));
        text = table(&rows);
    }
    let what = if dry_run { "Would reclaim" } else { "Total" };
    let _ = writeln!(text, "{what}: {}", human(pruned.bytes));
    text
}

fn object_row(object: &Object, now: SystemTime) -> Vec<String> {
    let id: String = object.id.chars().take(ID_LIMIT).collect();
    row([
        id,
        object.kind.name().to_owned(),
        human(object.bytes),
        ago(now, object.last_used),
        shown(&object.description),
    ])
}

fn usage_json(root: &str, objects: &[Object], verbose: bool) -> String {
    let kinds: Vec<Value> = usage(objects)
        .into_iter()
        .map(|(kind, usage)| {
            json!({
                "kind": kind,
                "count": usage.count,
                "bytes": usage.bytes,
                "reclaimable_bytes": usage.reclaimable,
            })
        })
        .collect();
    let (bytes, reclaimable) = sums(objects);
    let mut all = json!({
        "root": root,
        "kinds": kinds,
        "bytes": bytes,
        "reclaimable_bytes": reclaimable,
    });
    if verbose {
        all["objects"] = objects.iter().map(object_json).collect();
    }
    pretty(&all)
}

fn usage_text(objects: &[Object], verbose: bool, now: SystemTime) -> String {
    let mut text = String::new();
    if verbose {
        for object in objects {
            let _ = writeln!(text, "ID:          {}", object.id);
            let _ = writeln!(text, "Kind:        {}", object.kind.name());
            let _ = writeln!(text, "Created at:  {}", rfc3339(object.created));
            let _ = writeln!(text, "Last used:   {}", ago(now, object.last_used));
            let _ = writeln!(text, "Size:        {}", human(object.bytes));
            let _ = writeln!(text, "Reclaimable: {}", !object.in_use);
            if let Some(layer) = &object.layer {
                let _ = writeln!(text, "Layer:       {layer}");
            }
            if !object.description.is_empty() {
                let _ = writeln!(text, "Description: {}", shown(&object.description));
            }
            text.push('\n');
        }
    }
    let mut rows = vec![row(["KIND", "COUNT", "SIZE", "RECLAIMABLE"])];
    for (kind, usage) in usage(objects) {
        rows.push(row([
            kind.name().to_owned(),
            usage.count.to_string(),
            human(usage.bytes),
            human(usage.reclaimable),
        ]));
    }
    text += &table(&rows);
    let (bytes, reclaimable) = sums(objects);
    let _ = writeln!(text, "\nReclaimable: {}", human(reclaimable));
    let _ = writeln!(text, "Total:       {}", human(bytes));
    text
}

#[derive(Clone, Copy, Default)]
struct Usage {
    count: usize,
    bytes: u64,
    reclaimable: u64,
}

fn usage(objects: &[Object]) -> Vec<(Kind, Usage)> {
    let mut kinds: BTreeMap<Kind, Usage> = Kind::ALL.map(|kind| (kind, Usage::default())).into();
    for object in objects {
        let usage = kinds.entry(object.kind).or_default();
        usage.count += 1;
        usage.bytes += object.bytes;
        usage.reclaimable += if object.in_use { 0 } else { object.bytes };
    }
    kinds.into_iter().collect()
}

/// All bytes, and those of what nobody uses.
fn sums(objects: &[Object]) -> (u64, u64) {
    let reclaimable = objects.iter().filter(|object| !object.in_use);
    (
        objects.iter().map(|object| object.bytes).sum(),
        reclaimable.map(|object| object.bytes).sum(),
    )
}

fn object_json(object: &Object) -> Value {
    json!({
        "id": object.id,
        "kind": object.kind,
        "bytes": object.bytes,
        "created": rfc3339(object.created),
        "last_used": rfc3339(object.last_used),
        "in_use": object.in_use,
        "description": object.description,
        "layer": object.layer,
    })
}

/// A step that the cache has. It may be recorded several times, under all that it is found by.
struct Step<'o> {
    record: &'o Object,
    /// What its layer takes, compressed.
    bytes: u64,
}

impl<'o> Step<'o> {
    fn all(objects: &'o [Object]) -> Vec<Self> {
        let blobs: BTreeMap<_, _> = objects
            .iter()
            .filter(|object| object.kind == Kind::Blob)
            .filter_map(|object| Some((object.blob.as_ref()?, object.bytes)))
            .collect();
        let mut records: Vec<_> = objects
            .iter()
            .filter(|object| object.kind == Kind::Step)
            .collect();
        records.sort_by(|a, b| (b.last_used, &b.id).cmp(&(a.last_used, &a.id)));
        let mut seen = BTreeSet::new();
        // Of several records of one step with one result, the one that was used last.
        records.retain(|record| {
            let definition = record.id.split('/').next().unwrap_or_default();
            seen.insert((definition, record.blob.as_ref()))
        });
        records.reverse();
        let steps = records.into_iter().map(|record| Self {
            record,
            bytes: record
                .blob
                .as_ref()
                .and_then(|blob| blobs.get(blob).copied())
                .unwrap_or(0),
        });
        steps.collect()
    }

    fn to_json(&self) -> Value {
        json!({
            "id": self.record.id,
            "name": self.record.description,
            "layer": self.record.layer,
            "blob": self.record.blob,
            "bytes": self.bytes,
            "created": rfc3339(self.record.created),
            "last_used": rfc3339(self.record.last_used),
            "in_use": self.record.in_use,
        })
    }
}

fn steps_text(steps: &[Step<'_>], now: SystemTime) -> String {
    let mut rows = vec![row([
        "STEP",
        "LAYER",
        "SIZE",
        "CREATED",
        "LAST USED",
        "IN USE",
    ])];
    for Step { record, bytes } in steps {
        let layer = record.layer.as_ref().map(|layer| layer.digest().short());
        rows.push(row([
            shown(&record.description),
            layer.unwrap_or_default().to_owned(),
            human(*bytes),
            ago(now, record.created),
            ago(now, record.last_used),
            if record.in_use { "yes" } else { "no" }.to_owned(),
        ]));
    }
    table(&rows)
}

fn findings_json(root: &str, findings: &[Finding]) -> String {
    let all = findings.iter().map(|finding| {
        json!({
            "path": finding.path.display().to_string(),
            "problem": finding.problem,
            "advice": finding.advice,
            "repaired": finding.repaired,
        })
    });
    pretty(&json!({ "root": root, "findings": all.collect::<Vec<_>>() }))
}

fn findings_text(root: &str, findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let done = if finding.repaired {
            "repaired"
        } else {
            finding.advice
        };
        let path = shown_path(&finding.path.display().to_string());
        let _ = writeln!(text, "{path}: {}\n  {done}", finding.problem);
    }
    let left = findings.iter().filter(|finding| !finding.repaired).count();
    let _ = match (findings.len(), left) {
        (0, _) => writeln!(text, "the store {root} is sound"),
        (found, 0) => writeln!(text, "the store {root} is sound again: {found} repaired"),
        (found, left) => writeln!(
            text,
            "the store {root} has {found} problems, {left} of them left"
        ),
    };
    text
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn row<T: Into<String>, const N: usize>(cells: [T; N]) -> Vec<String> {
    cells.map(Into::into).into()
}

/// Columns as wide as their widest cell; the last one has no end.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A text of the Dockerfile's author for a terminal: one line, not too long, no controls.
fn shown(text: &str) -> String {
    let clean = shown_path(text);
    let mut line: String = clean.chars().take(DESCRIPTION_LIMIT).collect();
    if clean.chars().nth(DESCRIPTION_LIMIT).is_some() {
        line.push('…');
    }
    line
}

fn shown_path(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Bytes in decimal units with four digits, as Docker shows them.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        value if value >= 100.0 => 1,
        value if value >= 10.0 => 2,
        _ => 3,
    };
    let number = format!("{value:.digits$}");
    let number = number.trim_end_matches('0').trim_end_matches('.');
    format!(
        "{}{}",
        if number.is_empty() { "0" } else { number },
        UNITS[unit]
    )
}

/// How long ago something was, in words.
fn ago(now: SystemTime, then: SystemTime) -> String {
    let seconds = now.duration_since(then).unwrap_or_default().as_secs();
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {unit}{plural} ago")
}

/// RFC 3339 in UTC, to the second.
fn rfc3339(time: SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    let whole = time.replace_nanosecond(0).unwrap_or(time);
    let text = whole.format(&time::format_description::well_known::Rfc3339);
    // Years beyond 9999, which a file's time may claim.
    text.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_shown_as_docker_shows_them() {
        for (bytes, want) in [
            (0, "0B"),
            (1, "1B"),
            (999, "999B"),
            (1000, "1kB"),
            (8192, "8.192kB"),
            (1_653_000_000, "1.653GB"),
            (100_000_000_000, "100GB"),
            (123_456_789, "123.5MB"),
            (u64::MAX, "18.45EB"),
        ] {
            assert_eq!(human(bytes), want);
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (seconds, want) in [
            (0, "0 seconds ago"),
            (1, "1 second ago"),
            (61, "1 minute ago"),
            (7200, "2 hours ago"),
            (172_800, "2 days ago"),
        ] {
            assert_eq!(ago(now, now - Duration::from_secs(seconds)), want);
        }
        assert_eq!(ago(now, now + Duration::from_secs(9)), "0 seconds ago");
        assert_eq!(rfc3339(now), "1970-01-12T13:46:40Z");
    }

    #[test]
    fn durations_are_those_of_go() {
        let minutes = |n: u64| Some(Duration::from_secs(60 * n));
        for (text, want) in [
            ("24h", minutes(24 * 60)),
            ("2h30m", minutes(150)),
            ("1.5h", minutes(90)),
            ("0", minutes(0)),
            ("0s", minutes(0)),
            ("1500ms", Some(Duration::from_millis(1500))),
            ("", None),
            ("24", None),
            ("h", None),
            ("1d", None),
            ("-1h", None),
            ("1h ", None),
            ("99999999999999999999999h", None),
        ] {
            assert_eq!(duration(text), want, "{text:?}");
        }
    }

    #[test]
    fn filters_say_what_is_removed() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100 * 3600);
        let parse = |texts: &[&str]| {
            let mut options = PruneOptions::default();
            let parsed = texts.iter().map(|text| filter(&mut options, text, now));
            parsed.collect::<Option<()>>().map(|()| options)
        };
        let hours = |n: u64| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(n * 3600));
        assert_eq!(parse(&["until=24h"]).unwrap().unused_since, hours(76));
        let both = parse(&["until=24h", "until=10h"]).unwrap();
        assert_eq!(both.unused_since, hours(76), "both have to be true");
        let mounts = parse(&["type=exec.cachemount", "type=tree"]).unwrap();
        assert_eq!(mounts.kinds, [Kind::Mount, Kind::Tree].into());
        assert!(!mounts.all);
        assert!(parse(&["type=http"]).unwrap().all);
        assert_eq!(parse(&["id=abc"]).unwrap().id.as_deref(), Some("abc"));
        for wrong in ["", "until", "until=soon", "type=x", "id=", "shared=true"] {
            assert!(parse(&[wrong]).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn a_table_is_aligned_and_has_no_controls() {
        let rows = [
            row(["A", "LONGER"]),
            row(["x\u{e9}z".to_owned(), shown("RUN a\n\u{1b}[2Jb")]),
            row(["", ""]),
        ];
        assert_eq!(table(&rows), "A    LONGER\nxéz  RUN a  [2Jb\n\n");
        assert_eq!(shown(&"x".repeat(61)), format!("{}…", "x".repeat(60)));
        assert_eq!(shown(&"x".repeat(60)), "x".repeat(60));
    }
}
