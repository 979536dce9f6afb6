//! `USER` and `--chown`: names and numbers → numbers, looked up inside the image.

use std::io::Read;
use std::path::Path;

use super::below::Below;
use crate::io::LimitedReader;
use crate::sandbox::User;

/// The largest `/etc/passwd` or `/etc/group` that is read, in bytes. The files come from
/// an image, so their size is its author's choice.
const FILE_LIMIT_BYTES: u64 = 10 << 20;

/// A user as `/etc/passwd` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    /// Who.
    pub(super) user: User,
    /// The home directory; `/` where none is known.
    pub(super) home: String,
}

/// The image's accounts.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    passwd: Vec<Passwd>,
    group: Vec<Group>,
}

#[derive(Debug)]
struct Passwd {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

#[derive(Debug)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

impl Accounts {
    /// Reads `/etc/passwd` and `/etc/group` of `below`; absent files are empty. Blocking.
    ///
    /// # Errors
    /// Those of reading; a file over the limit.
    pub(super) fn read(below: impl Into<Below>) -> std::io::Result<Self> {
        let below = below.into();
        let passwd = read_file(&below, "etc/passwd")?;
        let group = read_file(&below, "etc/group")?;
        Ok(Self::parse(&passwd, &group))
    }

    /// Lines that are no entries are passed over, as the C library does.
    fn parse(passwd: &str, group: &str) -> Self {
        let passwd = passwd.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            Some(Passwd {
                name: (*fields.first()?).to_owned(),
                uid: fields.get(2)?.parse().ok()?,
                gid: fields.get(3)?.parse().ok()?,
                home: fields.get(5).copied().unwrap_or_default().to_owned(),
            })
        });
        let group = group.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let members = fields.get(3).copied().unwrap_or_default();
            Some(Group {
                name: (*fields.first()?).to_owned(),
                gid: fields.get(2)?.parse().ok()?,
                members: members
                    .split(',')
                    .filter(|m| !m.is_empty())
                    .map(str::to_owned)
                    .collect(),
            })
        });
        Self {
            passwd: passwd.collect(),
            group: group.collect(),
        }
    }

    /// `USER`: `user[:group]`, each a name or a number; empty is root.
    ///
    /// A number is never looked up as a name, and one without an account has group 0. `root` for
    /// both needs no account. The supplementary groups are the primary one and, unless that was
    /// given, those that list the account, as in Docker.
    pub(super) fn user(&self, text: &str) -> Result<Account, String> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
            None => (text, None),
        };
        let (user, group) = match (user, group) {
            ("", group) => ("0", group),
            (user, Some(group)) if is_root_or_number(user) && is_root_or_number(group) => {
                let digits = |text| if text == "root" { "0" } else { text };
                (digits(user), Some(digits(group)))
            }
            given => given,
        };
        let number = parse_id(user);
        let account = match number {
            Some(uid) => self.passwd.iter().find(|p| p.uid == uid),
            None => Some(
                self.passwd
                    .iter()
                    .find(|p| p.name == user)
                    .ok_or_else(|| format!("no user {user:?} in the image's /etc/passwd"))?,
            ),
        };
        let uid = account.map(|a| a.uid).or(number).unwrap_or_default();
        let explicit = group.map(|group| self.gid(group)).transpose()?;
        let gid = explicit.or(account.map(|a| a.gid)).unwrap_or_default();
        let mut groups = vec![gid];
        if let (Some(account), None) = (account, explicit) {
            groups.extend(
                self.group
                    .iter()
                    .filter(|g| g.members.contains(&account.name))
                    .map(|g| g.gid)
                    .filter(|group| *group != gid),
            );
        }
        let home = account
            .map(|a| a.home.as_str())
            .filter(|h| !h.is_empty())
            .unwrap_or("/");
        Ok(Account {
            user: User { uid, gid, groups },
            home: home.to_owned(),
        })
    }

    /// `--chown` in numbers, and what of it the image does not know.
    ///
    /// As in BuildKit, a user that is not known is 0:0, a group that is not known that of the
    /// user.
    pub(super) fn owner(&self, owner: &Owner) -> ((u32, u32), Vec<String>) {
        let mut unknown = Vec::new();
        let (uid, mut gid) = match &owner.user {
            OwnerPart::Id(id) => (*id, *id),
            OwnerPart::Name(name) => match self.passwd.iter().find(|p| p.name == *name) {
                Some(account) => (account.uid, account.gid),
                None => {
                    unknown.push(format!("no user {name:?} in the image's /etc/passwd"));
                    (0, 0)
                }
            },
        };
        match &owner.group {
            None => {}
            Some(OwnerPart::Id(id)) => gid = *id,
            Some(OwnerPart::Name(name)) => match self.group.iter().find(|g| g.name == *name) {
                Some(group) => gid = group.gid,
                None => unknown.push(format!("no group {name:?} in the image's /etc/group")),
            },
        }
        ((uid, gid), unknown)
    }

    fn gid(&self, text: &str) -> Result<u32, String> {
        if let Some(gid) = parse_id(text) {
            return Ok(gid);
        }
        match self.group.iter().find(|g| g.name == text) {
            Some(group) => Ok(group.gid),
            None => Err(format!("no group {text:?} in the image's /etc/group")),
        }
    }
}

/// `--chown`: `user[:group]`. A number without a group is both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    user: OwnerPart,
    group: Option<OwnerPart>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum OwnerPart {
    Id(u32),
    Name(String),
}

impl Owner {
    /// Reads `--chown`, which has no wrong form: what is no number is a name.
    pub(super) fn parse(text: &str) -> Self {
        let part = |text: &str| match text {
            "" | "root" => OwnerPart::Id(0),
            // The numbers that BuildKit takes for one.
            text => match text.parse::<i32>().map(u32::try_from) {
                Ok(Ok(id)) => OwnerPart::Id(id),
                _ => OwnerPart::Name(text.to_owned()),
            },
        };
        match text.split_once(':') {
            Some((user, group)) => Self {
                user: part(user),
                group: Some(part(group)),
            },
            None => Self {
                user: part(text),
                group: None,
            },
        }
    }

    /// The same in numbers, where it has no names.
    pub(super) fn ids(&self) -> Option<(u32, u32)> {
        match (&self.user, &self.group) {
            (OwnerPart::Id(user), None) => Some((*user, *user)),
            (OwnerPart::Id(user), Some(OwnerPart::Id(group))) => Some((*user, *group)),
            _ => None,
        }
    }
}

fn is_root_or_number(text: &str) -> bool {
    text == "root" || parse_id(text).is_some()
}

fn parse_id(text: &str) -> Option<u32> {
    let is_number = text.bytes().all(|b| b.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

fn read_file(below: &Below, path: &str) -> std::io::Result<String> {
    let Some(node) = below.lookup(Path::new(path), true)? else {
        return Ok(String::new());
    };
    if !node.file_type().is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    LimitedReader::new(
        below.content(&node)?,
        FILE_LIMIT_BYTES,
        "the image's account file",
    )
    .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::parse(
            "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000::/home/app:/bin/sh\nnohome:x:7:8\n99:x:5:5::/:\n",
            "root:x:0:\n98:x:6:\nstaff:x:50:deploy\naudio:x:29:app\nvideo:x:44:app,deploy\napp:x:1000:\n",
        )
    }

    #[track_caller]
    fn check(text: &str, uid: u32, gid: u32, groups: &[u32], home: &str) {
        let user = User {
            uid,
            gid,
            groups: groups.to_vec(),
        };
        assert_eq!(
            accounts().user(text),
            Ok(Account {
                user,
                home: home.to_owned()
            }),
            "{text}"
        );
    }

    #[test]
    fn owners_are_names_or_numbers() {
        for (text, expected, unknown) in [
            ("7", (7, 7), ""),
            // A number is not looked up.
            ("1000", (1000, 1000), ""),
            ("app", (1000, 1000), ""),
            ("nohome", (7, 8), ""),
            ("88:staff", (88, 50), ""),
            ("app:5", (1000, 5), ""),
            ("root:root", (0, 0), ""),
            (":staff", (0, 50), ""),
            ("app:", (1000, 0), ""),
            ("x", (0, 0), "no user \"x\" in the image's /etc/passwd"),
            ("x:9", (0, 9), "no user \"x\" in the image's /etc/passwd"),
            (
                "nohome:x",
                (7, 8),
                "no group \"x\" in the image's /etc/group",
            ),
            ("5:x", (5, 5), "no group \"x\" in the image's /etc/group"),
            (
                "4294967295",
                (0, 0),
                "no user \"4294967295\" in the image's /etc/passwd",
            ),
        ] {
            let (ids, missing) = accounts().owner(&Owner::parse(text));
            let missing = missing.join("; ");
            assert_eq!((ids, missing.as_str()), (expected, unknown), "{text}");
        }
    }

    #[test]
    fn owners_without_names_need_no_image() {
        for (text, expected) in [
            ("7", Some((7, 7))),
            ("7:8", Some((7, 8))),
            ("root", Some((0, 0))),
            ("5:root", Some((5, 0))),
            ("app", None),
            ("5:staff", None),
            ("app:5", None),
        ] {
            assert_eq!(Owner::parse(text).ids(), expected, "{text}");
        }
    }

    #[test]
    fn security_s19_root_and_numbers_need_no_account() {
        for (text, ids) in [
            ("root:root", (0, 0)),
            ("5:root", (5, 0)),
            ("root:7", (0, 7)),
        ] {
            let account = Accounts::default().user(text).unwrap();
            assert_eq!((account.user.uid, account.user.gid), ids, "{text}");
        }
        assert_eq!(
            Accounts::default().user("root"),
            Err("no user \"root\" in the image's /etc/passwd".into())
        );
    }

    #[test]
    fn security_s19_users_are_names_or_numbers() {
        check("", 0, 0, &[0], "/root");
        check("app", 1000, 1000, &[1000, 29, 44], "/home/app");
        check("1000", 1000, 1000, &[1000, 29, 44], "/home/app");
        check("app:staff", 1000, 50, &[50], "/home/app");
        check("1000:5", 1000, 5, &[5], "/home/app");
        check("4242", 4242, 0, &[0], "/");
        check("4242:4343", 4242, 4343, &[4343], "/");
        check("0:staff", 0, 50, &[50], "/root");
        check("nohome", 7, 8, &[8], "/");
        // Digits are a number, whatever names there are.
        check("99:98", 99, 98, &[98], "/");
        assert_eq!(
            accounts().user("x"),
            Err("no user \"x\" in the image's /etc/passwd".into())
        );
        assert_eq!(
            accounts().user("app:x"),
            Err("no group \"x\" in the image's /etc/group".into())
        );
    }
}
