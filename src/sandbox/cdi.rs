//! Devices by name, as of `RUN --device`: the Container Device Interface.
//!
//! What a name such as `vendor.com/gpu=0` stands for is described in files of directories
//! such as `/etc/cdi`, in JSON or YAML: device nodes, mounts and environment variables.
//! Names are looked up as BuildKit does. What a sandbox here cannot do, such as running
//! hooks, is not done, and [`Edits::left_out`] says so.
//! <https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{Device, Mount, MountSource};

/// Where descriptions are by default; the second one has the higher priority.
pub const DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

/// The versions of the specification that are understood.
const VERSIONS: [&str; 10] = [
    "0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0",
];

/// The longest description that is read.
const FILE_LIMIT_BYTES: u64 = 16 * 1024 * 1024;

/// With it a device has a further name, which several devices may share; as in BuildKit.
const CLASS_ANNOTATION: &str = "org.mobyproject.buildkit.device.class";
/// With it a device needs no permission of whoever builds; as in BuildKit.
const AUTO_ALLOW_ANNOTATION: &str = "org.mobyproject.buildkit.device.autoallow";

/// What devices need inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edits {
    /// The full names of the devices, each with whether its description says that whoever
    /// builds need not permit it.
    pub names: Vec<(String, bool)>,
    /// Device nodes.
    pub devices: Vec<Device>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Environment entries, `NAME=VALUE`; later ones win.
    pub env: Vec<String>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// What was asked for and is not done, one sentence each, for people.
    pub left_out: Vec<String>,
}

/// Why a device cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CdiError {
    /// No description has it.
    #[error("required device {name:?} is not registered in {dirs}{}", list(.problems))]
    NotRegistered {
        /// As it was asked for.
        name: String,
        /// Where it was looked for.
        dirs: String,
        /// Descriptions that could not be used, and why.
        problems: Vec<String>,
    },
    /// Its description asks for something that cannot be done and that it needs.
    #[error("device {name:?} ({}): {reason}", .file.display())]
    Unusable {
        /// Its full name.
        name: String,
        /// What describes it.
        file: PathBuf,
        /// Why.
        reason: String,
    },
}

fn list(problems: &[String]) -> String {
    let parts: Vec<String> = problems.iter().map(|text| format!("; {text}")).collect();
    parts.concat()
}

/// All descriptions of some directories.
#[derive(Debug, Default)]
pub struct Registry {
    dirs: Vec<PathBuf>,
    specs: Vec<Loaded>,
    /// Full names, in order, and where each is: the numbers of a description and of a
    /// device in it.
    devices: BTreeMap<String, (usize, usize)>,
    problems: Vec<String>,
}

#[derive(Debug)]
struct Loaded {
    file: PathBuf,
    /// The number of its directory.
    priority: usize,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    #[serde(rename = "cdiVersion")]
    version: String,
    kind: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
    devices: Vec<SpecDevice>,
    #[serde(default, rename = "containerEdits")]
    edits: SpecEdits,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecDevice {
    name: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
    #[serde(rename = "containerEdits")]
    edits: SpecEdits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct SpecEdits {
    env: Vec<String>,
    device_nodes: Vec<SpecNode>,
    net_devices: Vec<IgnoredAny>,
    hooks: Vec<SpecHook>,
    mounts: Vec<SpecMount>,
    intel_rdt: Option<IgnoredAny>,
    additional_gids: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct SpecNode {
    path: PathBuf,
    host_path: Option<PathBuf>,
    #[serde(default)]
    r#type: String,
    major: Option<u32>,
    minor: Option<u32>,
    file_mode: Option<IgnoredAny>,
    #[serde(default)]
    permissions: String,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct SpecMount {
    host_path: PathBuf,
    container_path: PathBuf,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default)]
    r#type: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SpecHook {
    hook_name: String,
    path: String,
}

impl Registry {
    /// Reads the files `*.json` and `*.yaml` of `dirs`, of which later ones have the higher
    /// priority. Directories need not exist; what cannot be used is told when a device is
    /// not found.
    pub fn read(dirs: &[PathBuf]) -> Self {
        let mut registry = Self {
            dirs: dirs.to_vec(),
            ..Self::default()
        };
        for (priority, dir) in dirs.iter().enumerate() {
            let files = match files(dir) {
                Ok(files) => files,
                Err(error) => {
                    let problem = format!("{}: {error}", dir.display());
                    registry.problems.push(problem);
                    continue;
                }
            };
            for file in files {
                match load(&file) {
                    Ok(spec) => registry.specs.push(Loaded {
                        file,
                        priority,
                        spec,
                    }),
                    Err(reason) => registry
                        .problems
                        .push(format!("{}: {reason}", file.display())),
                }
            }
        }
        registry.index();
        registry
    }

    fn index(&mut self) {
        let mut conflicts = Vec::new();
        for (spec_number, loaded) in self.specs.iter().enumerate() {
            for (device_number, device) in loaded.spec.devices.iter().enumerate() {
                let name = format!("{}={}", loaded.spec.kind, device.name);
                let other = self
                    .devices
                    .insert(name.clone(), (spec_number, device_number))
                    .map(|(other, _)| &self.specs[other]);
                if let Some(other) = other
                    && other.priority == loaded.priority
                {
                    self.problems.push(format!(
                        "device {name:?} is both in {} and in {}",
                        other.file.display(),
                        loaded.file.display()
                    ));
                    conflicts.push((name, loaded.priority));
                }
            }
        }
        for (name, priority) in conflicts {
            // A directory of higher priority decides.
            if let Some((spec, _)) = self.devices.get(&name)
                && self.specs[*spec].priority == priority
            {
                self.devices.remove(&name);
            }
        }
    }

    /// Returns what the devices `names` need; each comes with whether the step cannot do
    /// without it.
    ///
    /// A name is `VENDOR/CLASS=DEVICE`; `VENDOR/CLASS` is the first device of that class,
    /// `VENDOR/CLASS=*` stands for all, and anything else for the devices that have it as
    /// BuildKit's class annotation.
    ///
    /// # Errors
    /// [`CdiError`] where a required device is not there or one cannot be used.
    pub fn edits(&self, names: &[(&str, bool)]) -> Result<Edits, CdiError> {
        let mut found: Vec<&str> = Vec::new();
        let mut edits = Edits::default();
        for &(name, required) in names {
            let devices = self.find(name);
            if devices.is_empty() {
                let error = CdiError::NotRegistered {
                    name: name.to_owned(),
                    dirs: self.shown_dirs(),
                    problems: self.problems.clone(),
                };
                if required {
                    return Err(error);
                }
                edits
                    .left_out
                    .push(format!("optional device {name:?} is not registered"));
            }
            for device in devices {
                if !found.contains(&device) {
                    found.push(device);
                }
            }
        }
        let mut specs = Vec::new();
        for name in found {
            let (spec_number, device_number) = self.devices[name];
            let loaded = &self.specs[spec_number];
            let device = &loaded.spec.devices[device_number];
            let apply = |edits: &mut Edits, new: &SpecEdits| {
                add(edits, new, name).map_err(|reason| CdiError::Unusable {
                    name: name.to_owned(),
                    file: loaded.file.clone(),
                    reason,
                })
            };
            if !specs.contains(&spec_number) {
                specs.push(spec_number);
                apply(&mut edits, &loaded.spec.edits)?;
            }
            apply(&mut edits, &device.edits)?;
            let allowed = self.annotation(name, AUTO_ALLOW_ANNOTATION);
            let allowed = matches!(allowed, Some("1" | "t" | "T" | "true" | "TRUE" | "True"));
            edits.names.push((name.to_owned(), allowed));
        }
        Ok(edits)
    }

    fn shown_dirs(&self) -> String {
        let dirs: Vec<String> = self
            .dirs
            .iter()
            .map(|dir| dir.display().to_string())
            .collect();
        dirs.join(", ")
    }

    /// The full names that `name` stands for.
    fn find(&self, name: &str) -> Vec<&str> {
        let (kind, device) = name.split_once('=').unwrap_or((name, ""));
        let mut found: Vec<&str> = Vec::new();
        if is_kind(kind) {
            let of_kind = self
                .devices
                .keys()
                .map(String::as_str)
                .filter(|known| known.split_once('=').is_some_and(|(of, _)| of == kind));
            found = match device {
                "" => of_kind.take(1).collect(),
                "*" => of_kind.collect(),
                _ => of_kind.filter(|known| *known == name).collect(),
            };
        }
        if found.is_empty() {
            found = self
                .devices
                .keys()
                .map(String::as_str)
                .filter(|known| self.annotation(known, CLASS_ANNOTATION) == Some(name))
                .collect();
        }
        found
    }

    fn annotation(&self, device: &str, key: &str) -> Option<&str> {
        let (spec, number) = *self.devices.get(device)?;
        let spec = &self.specs[spec].spec;
        let own = spec.devices[number].annotations.get(key);
        own.or_else(|| spec.annotations.get(key))
            .map(String::as_str)
    }
}

/// The descriptions in a directory, by name.
fn files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let is_spec = path
            .extension()
            .is_some_and(|kind| kind == "json" || kind == "yaml");
        if is_spec && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn load(file: &Path) -> Result<Spec, String> {
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|file| file.take(FILE_LIMIT_BYTES + 1).read_to_string(&mut text))
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_LIMIT_BYTES {
        return Err(format!("it is longer than {FILE_LIMIT_BYTES} bytes"));
    }
    let spec: Spec = match file.extension().is_some_and(|kind| kind == "json") {
        true => serde_json::from_str(&text).map_err(|error| error.to_string())?,
        false => serde_saphyr::from_str(&text).map_err(|error| error.to_string())?,
    };
    check(&spec)?;
    Ok(spec)
}

fn check(spec: &Spec) -> Result<(), String> {
    let version = spec.version.trim_start_matches('v');
    if !VERSIONS.contains(&version) {
        return Err(format!("cdiVersion {:?} is not known", spec.version));
    }
    if !is_kind(&spec.kind) {
        return Err(format!("kind {:?} is not VENDOR/CLASS", spec.kind));
    }
    if spec.devices.is_empty() {
        return Err("it has no devices".to_owned());
    }
    for (number, device) in spec.devices.iter().enumerate() {
        let name = &device.name;
        if !is_name(name, |c| c.is_ascii_alphanumeric(), "_-.:") {
            return Err(format!("device name {name:?} is not valid"));
        }
        if spec.devices[..number]
            .iter()
            .any(|other| other.name == *name)
        {
            return Err(format!("device {name:?} is there twice"));
        }
    }
    let all = spec.devices.iter().map(|device| &device.edits);
    for edits in all.chain([&spec.edits]) {
        for entry in &edits.env {
            if entry.find('=').is_none_or(|at| at == 0) {
                return Err(format!("environment entry {entry:?} is not NAME=VALUE"));
            }
        }
        for node in &edits.device_nodes {
            let path = node.path.display();
            if !["", "b", "c", "u", "p"].contains(&node.r#type.as_str()) {
                return Err(format!(
                    "device {path}: type {:?} is not known",
                    node.r#type
                ));
            }
            if !node.permissions.chars().all(|c| "rwm".contains(c)) {
                let permissions = &node.permissions;
                return Err(format!(
                    "device {path}: permissions {permissions:?} are not of `rwm`"
                ));
            }
        }
    }
    Ok(())
}

/// Whether this is `VENDOR/CLASS`.
fn is_kind(kind: &str) -> bool {
    let is_part = |part: &str| is_name(part, |c| c.is_ascii_alphabetic(), "_-.");
    kind.split_once('/')
        .is_some_and(|(vendor, class)| is_part(vendor) && is_part(class))
}

fn is_name(name: &str, may_begin: impl Fn(char) -> bool, further: &str) -> bool {
    name.starts_with(may_begin)
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || further.contains(c))
}

/// Adds what one description or device needs.
fn add(edits: &mut Edits, new: &SpecEdits, name: &str) -> Result<(), String> {
    edits.env.extend(new.env.iter().cloned());
    let groups = new.additional_gids.iter().copied();
    edits.groups.extend(groups.filter(|gid| *gid != 0));
    for node in &new.device_nodes {
        let host_path = node.host_path.as_ref().unwrap_or(&node.path);
        check_numbers(node, host_path)?;
        if node.file_mode.is_some() || node.uid.is_some() || node.gid.is_some() {
            edits.left_out.push(format!(
                "device {name:?}: {} keeps the owner and mode that {} has on this machine",
                node.path.display(),
                host_path.display()
            ));
        }
        edits.devices.retain(|other| other.path != node.path);
        edits.devices.push(Device {
            path: node.path.clone(),
            host_path: host_path.clone(),
            permissions: match node.permissions.as_str() {
                "" => "rwm".to_owned(),
                given => given.to_owned(),
            },
        });
    }
    for mount in &new.mounts {
        edits
            .mounts
            .retain(|other| other.target != mount.container_path);
        edits.mounts.push(mount_of(mount)?);
    }
    for hook in &new.hooks {
        edits.left_out.push(format!(
            "device {name:?}: the {} hook {} is not run",
            hook.hook_name, hook.path
        ));
    }
    if !new.net_devices.is_empty() {
        return Err("network devices cannot be moved into a step".to_owned());
    }
    if new.intel_rdt.is_some() {
        edits.left_out.push(format!(
            "device {name:?}: no cache or memory bandwidth is allocated (intelRdt)"
        ));
    }
    Ok(())
}

/// Refuses a device that has other numbers here than described.
fn check_numbers(node: &SpecNode, host_path: &Path) -> Result<(), String> {
    let at = host_path.display();
    let found = std::fs::metadata(host_path).map_err(|error| format!("{at}: {error}"))?;
    let found = (
        rustix::fs::major(found.rdev()),
        rustix::fs::minor(found.rdev()),
    );
    let wanted = (node.major.unwrap_or(found.0), node.minor.unwrap_or(found.1));
    // Zero is what a description has that leaves the numbers to the machine.
    match wanted == found || wanted == (0, 0) {
        true => Ok(()),
        false => Err(format!(
            "{at} is device {}:{}, where {}:{} was expected",
            found.0, found.1, wanted.0, wanted.1
        )),
    }
}

fn mount_of(mount: &SpecMount) -> Result<Mount, String> {
    let target = mount.container_path.clone();
    let at = target.display();
    let mut read_only = false;
    let mut size_bytes = None;
    let mut mode = None;
    let is_tmpfs = mount.r#type == "tmpfs";
    for option in &mount.options {
        match (option.as_str(), option.split_once('=')) {
            ("ro", _) => read_only = true,
            ("rw", _) => read_only = false,
            // All mounts are like that.
            (
                "bind" | "rbind" | "nosuid" | "nodev" | "private" | "rprivate" | "slave" | "rslave",
                _,
            ) => {}
            (_, Some(("size", size))) if is_tmpfs && size.parse::<u64>().is_ok() => {
                size_bytes = size.parse().ok();
            }
            (_, Some(("mode", text))) if is_tmpfs && u32::from_str_radix(text, 8).is_ok() => {
                mode = u32::from_str_radix(text, 8).ok();
            }
            _ => {
                return Err(format!(
                    "the mount at {at} has the unknown option {option:?}"
                ));
            }
        }
    }
    let source = match mount.r#type.as_str() {
        "" | "bind" | "none" => MountSource::Bind(mount.host_path.clone()),
        "tmpfs" => MountSource::Tmpfs { size_bytes, mode },
        other => return Err(format!("the mount at {at} has the unknown type {other:?}")),
    };
    Ok(Mount {
        target,
        source,
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Directories with files: number of the directory, name, text.
    fn registry(files: &[(usize, &str, &str)]) -> (tempfile::TempDir, Registry) {
        let base = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = ["low", "high", "absent"]
            .iter()
            .map(|name| base.path().join(name))
            .collect();
        for dir in &dirs[..2] {
            std::fs::create_dir(dir).unwrap();
        }
        for (dir, name, text) in files {
            std::fs::write(dirs[*dir].join(name), text).unwrap();
        }
        let registry = Registry::read(&dirs);
        (base, registry)
    }

    const JSON: &str = r#"{
        "cdiVersion": "0.6.0",
        "kind": "vendor.com/gpu",
        "annotations": {"org.mobyproject.buildkit.device.class": "any-gpu"},
        "containerEdits": {"env": ["COMMON=1"]},
        "devices": [
            {"name": "1", "containerEdits": {
                "env": ["ONE=1"],
                "deviceNodes": [{"path": "/dev/gpu1", "hostPath": "/dev/null", "major": 1, "minor": 3}]
            }},
            {"name": "0",
             "annotations": {"org.mobyproject.buildkit.device.autoallow": "true"},
             "containerEdits": {
                "deviceNodes": [{"path": "/dev/zero", "permissions": "r"}],
                "mounts": [
                    {"hostPath": "/lib", "containerPath": "/opt/lib", "options": ["ro", "rbind"]},
                    {"hostPath": "", "containerPath": "/opt/mem", "type": "tmpfs",
                     "options": ["size=65536", "mode=0700"]}
                ],
                "additionalGids": [44, 0]
             }}
        ]
    }"#;

    const YAML: &str = "---
cdiVersion: 0.5.0
kind: other.org/net
containerEdits:
  hooks:
  - hookName: createContainer
    path: /usr/bin/hook
    args: [hook, --now]
devices:
- name: all
  containerEdits:
    deviceNodes:
    - path: /dev/null
      fileMode: 0666
      uid: 0
";

    fn names(edits: &Edits) -> Vec<&str> {
        edits.names.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn names_stand_for_what_they_stand_for_in_buildkit() {
        let (_base, registry) = registry(&[(0, "gpu.json", JSON), (1, "net.yaml", YAML)]);
        let check = |asked: &[&str], expected: &[&str]| {
            let asked: Vec<(&str, bool)> = asked.iter().map(|name| (*name, true)).collect();
            let edits = registry.edits(&asked).unwrap();
            assert_eq!(names(&edits), expected, "{asked:?}");
        };
        check(&["vendor.com/gpu=1"], &["vendor.com/gpu=1"]);
        check(&["vendor.com/gpu"], &["vendor.com/gpu=0"]);
        let both = ["vendor.com/gpu=0", "vendor.com/gpu=1"];
        check(&["vendor.com/gpu=*"], &both);
        check(&["any-gpu"], &both);
        check(&["vendor.com/gpu=0", "any-gpu"], &both);
        check(&["other.org/net=all"], &["other.org/net=all"]);
    }

    #[test]
    fn edits_of_description_and_device_come_together() {
        let (_base, registry) = registry(&[(0, "gpu.json", JSON)]);
        let edits = registry
            .edits(&[("vendor.com/gpu=*", true), ("absent.org/x=1", false)])
            .unwrap();
        let device = |path: &str, host_path: &str, permissions: &str| Device {
            path: path.into(),
            host_path: host_path.into(),
            permissions: permissions.to_owned(),
        };
        assert_eq!(
            edits,
            Edits {
                names: vec![
                    ("vendor.com/gpu=0".to_owned(), true),
                    ("vendor.com/gpu=1".to_owned(), false)
                ],
                devices: vec![
                    device("/dev/zero", "/dev/zero", "r"),
                    device("/dev/gpu1", "/dev/null", "rwm"),
                ],
                mounts: vec![
                    Mount {
                        target: "/opt/lib".into(),
                        source: MountSource::Bind("/lib".into()),
                        read_only: true,
                    },
                    Mount {
                        target: "/opt/mem".into(),
                        source: MountSource::Tmpfs {
                            size_bytes: Some(65536),
                            mode: Some(0o700),
                        },
                        read_only: false,
                    },
                ],
                env: vec!["COMMON=1".to_owned(), "ONE=1".to_owned()],
                groups: vec![44],
                left_out: vec!["optional device \"absent.org/x=1\" is not registered".to_owned()],
            }
        );
    }

    #[test]
    fn what_is_not_done_is_said() {
        let (_base, registry) = registry(&[(0, "net.yaml", YAML)]);
        let edits = registry.edits(&[("other.org/net=all", true)]).unwrap();
        assert_eq!(
            edits.left_out,
            [
                "device \"other.org/net=all\": the createContainer hook /usr/bin/hook is not run",
                "device \"other.org/net=all\": /dev/null keeps the owner and mode that /dev/null \
                 has on this machine",
            ]
        );
    }

    #[test]
    fn the_directory_of_higher_priority_decides() {
        let other = JSON.replace("ONE=1", "ONE=2");
        let (_base, high) = registry(&[(0, "a.json", JSON), (1, "a.json", &other)]);
        let edits = high.edits(&[("vendor.com/gpu=1", true)]).unwrap();
        assert_eq!(edits.env, ["COMMON=1", "ONE=2"]);

        let (base, same) = registry(&[(0, "a.json", JSON), (0, "b.json", &other)]);
        let error = same.edits(&[("vendor.com/gpu=1", true)]).unwrap_err();
        let low = base.path().join("low");
        let conflict = format!(
            "device \"vendor.com/gpu=1\" is both in {} and in {}",
            low.join("a.json").display(),
            low.join("b.json").display()
        );
        assert!(error.to_string().contains(&conflict), "{error}");
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        let check = |name: &str, text: &str, reason: &str| {
            let (base, registry) = registry(&[(0, name, text)]);
            let error = registry.edits(&[("vendor.com/gpu=1", true)]).unwrap_err();
            let base = base.path();
            let expected = format!(
                "required device \"vendor.com/gpu=1\" is not registered in {}, {}, {}; {}: ",
                base.join("low").display(),
                base.join("high").display(),
                base.join("absent").display(),
                base.join("low").join(name).display(),
            );
            let error = error.to_string();
            let rest = error.strip_prefix(&expected);
            assert!(rest.is_some_and(|rest| rest.contains(reason)), "{error}");
        };
        check("a.json", "{", "EOF while parsing");
        check("a.yaml", "kind: [", "line 1");
        check(
            "a.json",
            &JSON.replace("kind", "sort"),
            "unknown field `sort`",
        );
        check(
            "a.json",
            &JSON.replace("0.6.0", "9.0.0"),
            "cdiVersion \"9.0.0\" is not known",
        );
        check(
            "a.json",
            &JSON.replace("vendor.com/gpu", "gpu"),
            "kind \"gpu\" is not VENDOR/CLASS",
        );
        check(
            "a.json",
            &JSON.replace("\"name\": \"0\"", "\"name\": \"1\""),
            "device \"1\" is there twice",
        );
        check(
            "a.json",
            &JSON.replace("ONE=1", "ONE"),
            "environment entry \"ONE\" is not NAME=VALUE",
        );
        check(
            "a.json",
            &JSON.replace("\"r\"", "\"rx\""),
            "device /dev/zero: permissions \"rx\" are not of `rwm`",
        );

        let check = |text: String, reason: &str| {
            let (base, registry) = registry(&[(0, "a.json", &text)]);
            let error = registry.edits(&[("vendor.com/gpu=*", true)]).unwrap_err();
            let file = base.path().join("low/a.json");
            let error = error.to_string();
            let place = format!(" ({}): {reason}", file.display());
            assert!(error.ends_with(&place), "{error}");
        };
        check(
            JSON.replace("\"minor\": 3", "\"minor\": 5"),
            "/dev/null is device 1:3, where 1:5 was expected",
        );
        check(
            JSON.replace("/dev/zero", "/dev/absent-here"),
            "/dev/absent-here: No such file or directory (os error 2)",
        );
        check(
            JSON.replace("\"ro\"", "\"strange\""),
            "the mount at /opt/lib has the unknown option \"strange\"",
        );
        check(
            JSON.replace("tmpfs", "ext4"),
            "the mount at /opt/mem has the unknown option \"size=65536\"",
        );
    }
}
