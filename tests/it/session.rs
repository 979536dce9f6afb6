//! SSH agents and keys, as OpenSSH's own programs see them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sockless::session::{AgentSocket, SshAgents, SshSpec};

use crate::support::dir::TestDir;
use crate::support::programs;

/// OpenSSH's programs, with keys in a directory.
struct OpenSsh {
    dir: TestDir,
}

/// What a program said, and whether it succeeded.
struct Said {
    success: bool,
    stdout: String,
    stderr: String,
}

impl OpenSsh {
    fn new(purpose: &str) -> Self {
        Self {
            dir: TestDir::new(purpose),
        }
    }

    fn run(&self, agent: Option<&Path>, program: &str, args: &[&str]) -> Said {
        self.run_with_input(agent, program, args, None)
    }

    fn run_with_input(
        &self,
        agent: Option<&Path>,
        program: &str,
        args: &[&str],
        input: Option<&Path>,
    ) -> Said {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_remove("SSH_AUTH_SOCK")
            // Nothing may ask whoever runs the tests for a passphrase.
            .env_remove("DISPLAY")
            .stdin(Stdio::null());
        if let Some(agent) = agent {
            command.env("SSH_AUTH_SOCK", agent);
        }
        if let Some(input) = input {
            command.stdin(std::fs::File::open(input).expect("our own file"));
        }
        let output = command.output().expect("OpenSSH is installed");
        Said {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// A new key: its file, made by `ssh-keygen` with these arguments.
    fn key(&self, name: &str, args: &[&str]) -> PathBuf {
        let mut all = vec!["-q", "-f", name, "-C", "someone@somewhere"];
        if !args.contains(&"-N") {
            all.extend(["-N", ""]);
        }
        all.extend(args);
        let said = self.run(None, "ssh-keygen", &all);
        assert!(said.success, "ssh-keygen {all:?}: {}", said.stderr);
        self.dir.join(name)
    }

    /// The fingerprint of a key file.
    fn fingerprint(&self, key: &Path) -> String {
        let public = format!("{}.pub", key.display());
        let said = self.run(None, "ssh-keygen", &["-l", "-f", &public]);
        let field = said.stdout.split(' ').nth(1);
        field.expect("BITS FINGERPRINT COMMENT").to_owned()
    }

    /// The fingerprints of the keys that an agent lists.
    fn listed(&self, agent: &Path) -> Vec<String> {
        let said = self.run(Some(agent), "ssh-add", &["-l"]);
        assert!(said.success, "{}{}", said.stdout, said.stderr);
        let lines = said.stdout.lines();
        lines
            .map(|line| line.split(' ').nth(1).expect("a fingerprint").to_owned())
            .collect()
    }

    /// Signs through the agent with the key whose public half is `key`, and checks it without one.
    fn sign_and_verify(&self, agent: &Path, key: &Path) {
        let name = key.file_name().expect("a file").to_string_lossy();
        let message = self.dir.file(&format!("{name}.message"), "what is signed");
        let public = format!("{}.pub", key.display());
        // The agent alone has the private half.
        let moved = self.dir.join("moved");
        std::fs::rename(key, &moved).expect("our own file");
        let args = [
            "-Y",
            "sign",
            "-n",
            "test",
            "-f",
            &public,
            &message.display().to_string(),
        ];
        let said = self.run(Some(agent), "ssh-keygen", &args);
        std::fs::rename(&moved, key).expect("our own file");
        assert!(said.success, "{name}: {}", said.stderr);

        let text = std::fs::read_to_string(&public).expect("our own file");
        self.dir.file("signers", format!("me {text}"));
        let signature = format!("{}.sig", message.display());
        let args = [
            "-Y", "verify", "-n", "test", "-f", "signers", "-I", "me", "-s", &signature,
        ];
        let said = self.run_with_input(None, "ssh-keygen", &args, Some(&message));
        assert!(said.success, "{name}: {}{}", said.stdout, said.stderr);
        let other = self.dir.file("other", "what is not signed");
        let said = self.run_with_input(None, "ssh-keygen", &args, Some(&other));
        assert!(!said.success, "{name}: {}", said.stdout);
    }
}

fn serve(spec: &str, path: &Path) -> AgentSocket {
    let spec: SshSpec = spec.parse().expect("a good argument");
    let id = spec.id.clone();
    let agents = SshAgents::new([spec], |_| None).expect("the files are there");
    agents.serve(&id, path).expect("the agent is there")
}

/// The kinds of key that `ssh-keygen` makes, in each of its formats.
const KEYS: &[(&str, &[&str])] = &[
    ("ed25519", &["-t", "ed25519"]),
    ("rsa", &["-t", "rsa", "-b", "2048"]),
    ("p256", &["-t", "ecdsa", "-b", "256"]),
    ("p384", &["-t", "ecdsa", "-b", "384"]),
    ("p521", &["-t", "ecdsa", "-b", "521"]),
    ("rsa-pem", &["-t", "rsa", "-b", "2048", "-m", "PEM"]),
    ("p256-pem", &["-t", "ecdsa", "-b", "256", "-m", "PEM"]),
    ("p521-pem", &["-t", "ecdsa", "-b", "521", "-m", "PEM"]),
    ("rsa-pkcs8", &["-t", "rsa", "-b", "2048", "-m", "PKCS8"]),
    ("p384-pkcs8", &["-t", "ecdsa", "-b", "384", "-m", "PKCS8"]),
];

#[test]
fn key_files_are_an_agent_for_openssh() {
    needs!(programs(&["ssh-add", "ssh-keygen"]));
    let ssh = OpenSsh::new("ssh-keys");
    let keys: Vec<PathBuf> = KEYS
        .iter()
        .map(|(name, args)| ssh.key(name, args))
        .collect();
    let paths: Vec<String> = keys.iter().map(|key| key.display().to_string()).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _runtime = runtime.enter();
    let socket = serve(&format!("x={}", paths.join(",")), &ssh.dir.join("socket"));

    let expected: Vec<String> = keys.iter().map(|key| ssh.fingerprint(key)).collect();
    assert_eq!(ssh.listed(socket.path()), expected);
    for key in &keys {
        ssh.sign_and_verify(socket.path(), key);
    }
    let said = ssh.run(Some(socket.path()), "ssh-add", &["-l"]);
    assert!(
        !said.stdout.contains("someone@somewhere"),
        "{}",
        said.stdout
    );
    refuses_changes(&ssh, socket.path());
    assert_eq!(ssh.listed(socket.path()), expected);
}

/// Nothing that `ssh-add` does to an agent succeeds.
fn refuses_changes(ssh: &OpenSsh, agent: &Path) {
    let key = ssh.key("another", &["-t", "ed25519"]).display().to_string();
    let known = format!("{}.pub", ssh.dir.join("ed25519").display());
    for args in [
        &["-D"][..],
        &["-d", &known],
        &[&key],
        &["-c", "-t", "60", &key],
    ] {
        let said = ssh.run(Some(agent), "ssh-add", args);
        assert!(
            !said.success,
            "ssh-add {args:?}: {}{}",
            said.stdout, said.stderr
        );
    }
}

#[test]
fn the_users_agent_is_lent_and_stays_as_it_is() {
    needs!(programs(&["ssh-agent", "ssh-add", "ssh-keygen"]));
    let ssh = OpenSsh::new("ssh-agent");
    let agent = ssh.dir.join("agent");
    // In the foreground, and ended when the test ends, however that is.
    let child = Command::new("ssh-agent")
        .args(["-D", "-a"])
        .arg(&agent)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("ssh-agent is installed");
    let mut child = Ended(child);
    // It says where it is when it is there.
    let mut line = String::new();
    let stdout = child.0.stdout.take().expect("piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)
        .expect("ssh-agent says something");
    assert!(line.contains("SSH_AUTH_SOCK="), "{line}");
    let keys = [
        ssh.key("ed25519", &["-t", "ed25519"]),
        ssh.key("rsa", &["-t", "rsa", "-b", "2048"]),
    ];
    for key in &keys {
        let said = ssh.run(Some(&agent), "ssh-add", &[&key.display().to_string()]);
        assert!(said.success, "{}", said.stderr);
    }

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _runtime = runtime.enter();
    let spec: SshSpec = "default".parse().expect("a good argument");
    let agents = SshAgents::new([spec], |name| {
        (name == "SSH_AUTH_SOCK").then(|| agent.clone().into_os_string())
    });
    let agents = agents.expect("the agent is there");
    let socket = agents
        .serve("", &ssh.dir.join("socket"))
        .expect("the agent is there");
    let expected: Vec<String> = keys.iter().map(|key| ssh.fingerprint(key)).collect();
    assert_eq!(ssh.listed(socket.path()), expected);
    for key in &keys {
        ssh.sign_and_verify(socket.path(), key);
    }
    refuses_changes(&ssh, socket.path());
    assert_eq!(ssh.listed(&agent), expected);

    let path = socket.path().to_owned();
    runtime.block_on(socket.close());
    let said = ssh.run(Some(&path), "ssh-add", &["-l"]);
    assert!(
        said.stderr.contains("No such file or directory"),
        "{}",
        said.stderr
    );
    // Its owner's own way to it is as before.
    assert_eq!(ssh.listed(&agent), expected);
}

#[test]
fn encrypted_keys_are_refused_in_every_format() {
    needs!(programs(&["ssh-keygen"]));
    let ssh = OpenSsh::new("ssh-encrypted");
    for format in ["RFC4716", "PEM", "PKCS8"] {
        let args = ["-t", "rsa", "-b", "2048", "-N", "passphrase", "-m", format];
        let key = ssh.key(format, &args).display().to_string();
        let spec: SshSpec = format!("x={key}").parse().expect("a good argument");
        let error = SshAgents::new([spec], |_| None).expect_err("it is encrypted");
        assert_eq!(error.to_string(), format!("--ssh x: key file {key}"));
        let source = std::error::Error::source(&error).expect("why");
        assert_eq!(
            source.to_string(),
            "it is encrypted with a passphrase; add it to an agent (ssh-add) \
             and give the agent's socket instead of the file",
            "{format}"
        );
    }
}

/// A program that ends with its owner.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
