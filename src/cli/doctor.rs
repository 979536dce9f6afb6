//! `sockless doctor`: what works on this host, and the line that unlocks what does not.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::registry::parse_registry;
use super::request::{Machine, RequestError};
use super::store::human;
use crate::failure::Kind;
use crate::image::{Reference, Repository};
use crate::pipeline::doctor::{self, Inside, Report};
use crate::registry::{self, Examined};
use crate::sandbox::World;
use crate::sandbox::doctor::{Lack, RungReport};

/// Arguments of `sockless doctor`.
#[derive(Clone, Debug, Args)]
pub(super) struct DoctorArgs {
    /// The store [env: SOCKLESS_ROOT] [default: /var/lib/sockless as root, else $XDG_DATA_HOME/sockless]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Prints JSON
    #[arg(long)]
    json: bool,

    /// Asks no registry
    #[arg(long)]
    offline: bool,

    /// A URL that is asked before registry HOST [env: SOCKLESS_REGISTRY_MIRROR, separated by commas]
    #[arg(long = "registry-mirror", value_name = "HOST=URL")]
    registry_mirrors: Vec<String>,

    /// A registry that may be spoken to over HTTP or with any certificate
    /// [env: SOCKLESS_INSECURE_REGISTRY, separated by commas]
    #[arg(long = "insecure-registry", value_name = "HOST[:PORT]")]
    insecure_registries: Vec<String>,

    /// Certificates (PEM) that are trusted beside the system's
    /// [env: SOCKLESS_REGISTRY_CA, separated by commas]
    #[arg(long = "registry-ca", value_name = "FILE")]
    registry_ca_files: Vec<PathBuf>,

    /// Tries what works in the namespaces of a build, and prints JSON; for sockless itself
    #[arg(long, hide = true)]
    inside: bool,

    /// Registries to ask [default: Docker Hub, and all that credentials are kept for]
    #[arg(value_name = "REGISTRY")]
    registries: Vec<String>,
}

/// `sockless doctor`, validated.
#[derive(Debug)]
pub struct DoctorCommand {
    root: PathBuf,
    json: bool,
    offline: bool,
    inside: bool,
    options: registry::Options,
    registries: Vec<Repository>,
}

impl DoctorCommand {
    pub(super) fn from_args<E: Fn(&str) -> Option<OsString>>(
        args: DoctorArgs,
        machine: &Machine<E>,
    ) -> Result<Self, RequestError> {
        let named = args.registries.iter().map(|name| {
            let host = parse_registry(name).and_then(|host| repository(&host));
            host.ok_or_else(|| RequestError::Registry(name.clone()))
        });
        Ok(Self {
            root: machine.root(args.root.as_deref())?,
            json: args.json,
            offline: args.offline,
            inside: args.inside,
            registries: named.collect::<Result<_, _>>()?,
            options: super::registry::options(
                &args.registry_mirrors,
                &args.insecure_registries,
                args.registry_ca_files,
                machine,
            )?,
        })
    }

    /// Whether this process is one that looks from inside of the namespaces of a build.
    pub fn is_inside(&self) -> bool {
        self.inside
    }
}

/// Any repository of the registry `host`.
fn repository(host: &str) -> Option<Repository> {
    let reference = Reference::parse(&format!("{host}/a/b")).ok()?;
    Some(reference.repository().clone())
}

/// Prints what works here; returns 0 where a build with RUN would work, else the code with which it
/// would end.
pub fn doctor(command: DoctorCommand) -> u8 {
    let json = command.json;
    let report = match examine(command) {
        Ok(report) => report,
        Err(error) => return super::report(&error),
    };
    let text = match json {
        true => serde_json::to_string_pretty(&report).map(|text| text + "\n"),
        false => Ok(text_of(&report)),
    };
    let printed = text.map_err(io::Error::from).and_then(|text| print(&text));
    match printed {
        Err(error) => super::report(&anyhow::Error::new(error).context("printing the findings")),
        Ok(()) if report.build.works => 0,
        Ok(()) => Kind::SandboxUnavailable.exit_code(),
    }
}

fn examine(command: DoctorCommand) -> anyhow::Result<Report> {
    let mut report = doctor::host(&command.root);
    if !command.offline {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the async runtime")?;
        let asked = doctor::registries(command.options, command.registries, repository);
        report.registries = runtime.block_on(asked)?;
    }
    Ok(report)
}

/// Prints, as JSON, what works in `world`.
pub fn doctor_inside(command: &DoctorCommand, world: &World) -> u8 {
    let found = doctor::inside(&command.root, world);
    let printed = serde_json::to_string(&found).map_err(io::Error::from);
    match printed.and_then(|text| print(&text)) {
        Ok(()) => 0,
        Err(error) => super::report(&error.into()),
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The document, for people.
fn text_of(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_report(&mut text, report);
    text
}

fn write_report(text: &mut String, report: &Report) -> std::fmt::Result {
    let user = &report.user;
    writeln!(
        text,
        "user {} (uid {}, gid {}), Linux {}{}",
        user.name,
        user.uid,
        user.gid,
        report.kernel,
        guards(report)
    )?;
    text.push('\n');
    for rung in &report.rungs {
        write_rung(text, rung, report)?;
    }
    if let Some(inside) = &report.inside {
        text.push('\n');
        write_inside(text, inside)?;
    }
    for (at, examined) in report.registries.iter().enumerate() {
        text.push_str(if at == 0 { "\n" } else { "" });
        write_registry(text, examined)?;
    }
    text.push('\n');
    write_outlook(text, report)
}

fn guards(report: &Report) -> String {
    let guards = &report.guards;
    let mut words = String::new();
    if guards.no_new_privs {
        words += ", no_new_privs";
    }
    if guards.seccomp_filter {
        words += ", seccomp filter";
    }
    if let Some(profile) = &guards.apparmor {
        words += &format!(", AppArmor profile {profile}");
    }
    words
}

/// Yes or no, and a name, in columns.
fn head(text: &mut String, works: bool, name: &str) -> std::fmt::Result {
    write!(text, "{} {name:<17} ", if works { "yes" } else { "no " })
}

/// What is missing, each with what unlocks it below.
fn write_lacks(text: &mut String, lacks: &[Lack]) -> std::fmt::Result {
    for (at, lack) in lacks.iter().enumerate() {
        let indent = if at == 0 { 0 } else { 22 };
        writeln!(text, "{:indent$}{}", "", lack.reason)?;
        if let Some(line) = &lack.unlock {
            writeln!(text, "{:22}to unlock: {line}", "")?;
        }
    }
    Ok(())
}

fn write_rung(text: &mut String, rung: &RungReport, report: &Report) -> std::fmt::Result {
    head(text, rung.works, &format!("{} {}", rung.number, rung.name))?;
    if !rung.works {
        return write_lacks(text, &rung.lacks);
    }
    let inside = report.inside.as_ref();
    let here = inside.filter(|inside| inside.rung == rung.number);
    let isolation = if rung.isolates { "" } else { "isolates less; " };
    let taken = if here.is_some() {
        "taken by builds"
    } else {
        ""
    };
    let ids = match here.map(|inside| (inside.users, inside.groups)) {
        Some((Some(users), Some(groups))) => format!(" ({users} users, {groups} groups)"),
        _ => String::new(),
    };
    let line = format!("{isolation}{taken}{ids}");
    writeln!(text, "{}", line.trim_end_matches("; "))
}

fn write_inside(text: &mut String, inside: &Inside) -> std::fmt::Result {
    for program in &inside.sandboxes {
        head(text, program.works, &program.name)?;
        match program.works {
            true => writeln!(text, "{}", program.version.as_deref().unwrap_or("works"))?,
            false => write_lacks(text, &program.lacks)?,
        }
    }
    for helper in &inside.networks {
        head(text, helper.works, &helper.name)?;
        match helper.works {
            true => writeln!(text, "RUN steps have a network of their own")?,
            false => write_lacks(text, &helper.lacks)?,
        }
    }
    let overlay = inside.rootfs.backend.as_deref() == Some("overlay");
    head(text, overlay, "overlay")?;
    match overlay {
        true => writeln!(text, "root filesystems are mounted")?,
        false if inside.rootfs.backend.is_some() => write_lacks(text, &inside.rootfs.lacks)?,
        false => writeln!(text, "not tried, as the store cannot be written to")?,
    }
    head(text, inside.filters.seccomp, "seccomp")?;
    writeln!(text, "Docker's filter of system calls")?;
    head(text, inside.filters.landlock.is_some(), "landlock")?;
    match inside.filters.landlock {
        Some(version) => writeln!(text, "version {version}")?,
        None => writeln!(text, "the kernel has none, or it is not in use")?,
    }
    write_places(text, inside)
}

fn write_places(text: &mut String, inside: &Inside) -> std::fmt::Result {
    let store = &inside.store;
    head(text, store.place.writable, "store")?;
    match store.place.writable {
        true => {
            write!(text, "{}", store.place.path.display())?;
            if let Some(bytes) = store.free_bytes {
                write!(text, ", {} free", human(bytes))?;
            }
            writeln!(
                text,
                "{}",
                if store.exists { "" } else { ", not there yet" }
            )?;
        }
        false => write_lacks(text, &store.place.lacks)?,
    }
    let temporary = &inside.temporary;
    head(text, temporary.writable, "TMPDIR")?;
    match temporary.writable {
        true => writeln!(text, "{}", temporary.path.display()),
        false => write_lacks(text, &temporary.lacks),
    }
}

fn write_registry(text: &mut String, examined: &Examined) -> std::fmt::Result {
    let name = match (examined.is_mirror, &examined.url) {
        (true, Some(url)) => format!("{} ({url})", examined.registry),
        _ => examined.registry.clone(),
    };
    let works = examined.reachable && examined.failure.is_none();
    head(text, works, &name)?;
    let wants = match examined.authentication {
        Some("none") => "answers, wants no credentials",
        Some("basic") => "answers, wants a password",
        Some("bearer") => "answers, wants a token",
        Some(_) => "answers, wants credentials of an unknown kind",
        None => "does not answer",
    };
    writeln!(text, "{wants}")?;
    if let Some(reason) = &examined.reason {
        writeln!(text, "{:22}{reason}", "")?;
    }
    let places = examined.places.as_deref().unwrap_or("unknown places");
    match (examined.credentials, examined.accepted) {
        (None, _) => writeln!(text, "{:22}no credentials in {places}", "")?,
        (Some(kind), accepted) => {
            let accepted = match accepted {
                Some(true) => "accepted",
                Some(false) => "refused",
                None => "not tried",
            };
            writeln!(
                text,
                "{:22}credentials ({kind}) from {places}: {accepted}",
                ""
            )?;
        }
    }
    match &examined.unlock {
        Some(line) => writeln!(text, "{:22}to unlock: {line}", ""),
        None => Ok(()),
    }
}

fn write_outlook(text: &mut String, report: &Report) -> std::fmt::Result {
    let build = &report.build;
    let word = |word: &Option<String>| word.clone().unwrap_or_else(|| "unknown".to_owned());
    match (build.works, build.rung) {
        (true, Some(number)) => {
            let network = match &build.network_helper {
                Some(helper) => format!("a private network by {helper}"),
                None => "the host's network".to_owned(),
            };
            writeln!(
                text,
                "RUN works here: rung {number}, in {}, root filesystems by {}, {network}",
                word(&build.sandbox),
                word(&build.rootfs)
            )
        }
        _ => {
            writeln!(text, "RUN does not work here:")?;
            for lack in &build.lacks {
                writeln!(text, "{:22}{}", "", lack.reason)?;
                if let Some(line) = &lack.unlock {
                    writeln!(text, "{:22}to unlock: {line}", "")?;
                }
            }
            Ok(())
        }
    }
}
