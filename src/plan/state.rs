//! What one stage accumulates: environment, arguments, config, history, filesystem.

use super::StepId;
use crate::dockerfile::expand::Environment;
use crate::image::{DEFAULT_PATH, History, ImageConfig, Platform};

/// The comment of history entries that this program writes.
const HISTORY_COMMENT: &str = "sockless.dockerfile.v0";

/// The shell of shell forms where neither image nor `SHELL` says another.
const DEFAULT_SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// The same in images for Windows.
const WINDOWS_SHELL: [&str; 3] = ["cmd", "/S", "/C"];

/// Arguments that say something of a stage and are no variables in it, as in BuildKit.
const NO_VARIABLES: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// The state of a stage after some of its instructions.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// The config that the image gets; `config.env` has what `ENV` set, no arguments.
    pub image: ImageConfig,
    /// What variables are worth and `RUN` sees: `ENV` and `ARG`, in the order in which
    /// the names first came; a later one wins over an earlier one, whichever they are.
    pub env: Vec<(String, String)>,
    /// The arguments declared, each once, with the value given last: for history.
    pub args: Vec<(String, String)>,
    /// The filesystem so far.
    pub step: Option<StepId>,
    /// Whether this stage itself had a `CMD`.
    pub has_cmd: bool,
    /// The entries that this Dockerfile adds, those of parent stages included.
    pub history: Vec<History>,
}

impl State {
    /// The state after `FROM scratch`.
    pub(super) fn scratch(platform: Platform) -> Self {
        let mut image = ImageConfig::scratch(platform);
        image.config.working_dir = "/".to_owned();
        Self::from_image(image, None)
    }

    /// The state after `FROM` of an image whose filesystem is `step`.
    pub(super) fn from_image(mut image: ImageConfig, step: Option<StepId>) -> Self {
        // Docker's older engines left notes about the container in which an image was
        // made. They are not true of what is built on it.
        image.other.retain(|key, _| key == "os.features");
        image.config.other.retain(|key, _| key == "StopTimeout");
        // Windows has its own idea of a search path.
        let env = &mut image.config.env;
        let has_path = env
            .iter()
            .any(|pair| pair.split('=').next() == Some("PATH"));
        if !has_path && image.platform.os != "windows" {
            env.push(format!("PATH={DEFAULT_PATH}"));
        }
        let mut state = Self {
            image,
            env: Vec::new(),
            args: Vec::new(),
            step,
            has_cmd: false,
            history: Vec::new(),
        };
        for pair in state.image.config.env.clone() {
            let (name, value) = pair.split_once('=').unwrap_or((&pair, ""));
            state.set_variable(name, value);
        }
        state
    }

    /// The state after `FROM` of this stage.
    pub(super) fn child(&self) -> Self {
        Self {
            has_cmd: false,
            ..self.clone()
        }
    }

    /// Sets what a variable is worth, for expansion and `RUN`.
    pub(super) fn set_variable(&mut self, name: &str, value: &str) {
        set(&mut self.env, name, value);
    }

    /// `ENV`: sets a variable for the image too.
    pub(super) fn set_env(&mut self, name: &str, value: &str) {
        self.set_variable(name, value);
        let pair = format!("{name}={value}");
        let env = &mut self.image.config.env;
        match env.iter_mut().find(|p| p.split('=').next() == Some(name)) {
            Some(known) => *known = pair,
            None => env.push(pair),
        }
    }

    /// `ARG`.
    pub(super) fn declare_arg(&mut self, name: &str, value: Option<&str>) {
        let text = value.unwrap_or_default();
        set(&mut self.args, name, text);
        if let Some(value) = value
            && !NO_VARIABLES.contains(&name)
        {
            self.set_variable(name, value);
        }
    }

    /// How many bytes its variables and labels have.
    pub(super) fn bytes(&self) -> usize {
        let env = self
            .env
            .iter()
            .map(|(name, value)| name.len() + value.len());
        let labels = self.image.config.labels.iter();
        env.sum::<usize>()
            + labels
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>()
    }

    /// How many bytes the history has from its entry `from` on.
    pub(super) fn history_bytes(&self, from: usize) -> usize {
        let entries = self.history.iter().skip(from);
        let texts = entries.filter_map(|entry| entry.created_by.as_ref());
        texts.map(String::len).sum()
    }

    /// What variables are worth, for expansion.
    pub(super) fn environment(&self) -> Environment {
        self.env.iter().cloned().collect()
    }

    /// The shell of shell forms.
    pub(super) fn shell(&self) -> Vec<String> {
        match &self.image.config.shell {
            Some(shell) if !shell.is_empty() => shell.clone(),
            _ if self.image.platform.os == "windows" => WINDOWS_SHELL.map(str::to_owned).to_vec(),
            _ => DEFAULT_SHELL.map(str::to_owned).to_vec(),
        }
    }

    /// The current directory, absolute.
    pub(super) fn working_dir(&self) -> &str {
        match self.image.config.working_dir.as_str() {
            "" => "/",
            path => path,
        }
    }

    /// The arguments in front of a `RUN` in history: `|2 A=1 B=2`.
    pub(super) fn history_args(&self) -> String {
        let mut text = String::new();
        if !self.args.is_empty() {
            text = format!("|{}", self.args.len());
            for (name, given) in &self.args {
                let variable = self.env.iter().find(|(n, _)| n == name);
                let value = variable.map_or(given, |(_, value)| value);
                text.push_str(&format!(" {name}={value}"));
            }
            text.push(' ');
        }
        text
    }

    /// Adds a history entry.
    pub(super) fn record(&mut self, created_by: String, empty_layer: bool) {
        self.history.push(History {
            created: None,
            created_by: Some(created_by),
            author: None,
            comment: Some(HISTORY_COMMENT.to_owned()),
            empty_layer,
        });
    }
}

fn set(env: &mut Vec<(String, String)>, name: &str, value: &str) {
    match env.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => value.clone_into(known),
        None => env.push((name.to_owned(), value.to_owned())),
    }
}
