//! [`Ids`]: users and groups of a process as it believes them to be, and what it may make of them.
//!
//! The rules are the kernel's for a process whose capabilities go with its effective user: see
//! `credentials(7)`, `setresuid(2)`.

use rustix::io::Errno;

/// "Leave it as it is", in the calls that set several.
const KEEP: u32 = u32::MAX;

/// The most supplementary groups (`NGROUPS_MAX`).
pub(super) const GROUPS_MAX: usize = 65536;

/// Four numbers of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Four {
    pub(super) real: u32,
    pub(super) effective: u32,
    pub(super) saved: u32,
    /// Whom files belong to that the process makes.
    pub(super) filesystem: u32,
}

/// Who a process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ids {
    pub(super) user: Four,
    pub(super) group: Four,
    pub(super) groups: Vec<u32>,
}

/// Users or groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    User,
    Group,
}

/// A call that changes who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// `setuid`, `setgid`.
    One(Kind, u32),
    /// `setreuid`, `setregid`: real, effective.
    Two(Kind, u32, u32),
    /// `setresuid`, `setresgid`: real, effective, saved.
    Three(Kind, u32, u32, u32),
    /// `setfsuid`, `setfsgid`.
    Filesystem(Kind, u32),
    /// `setgroups`.
    Groups(Vec<u32>),
}

impl Ids {
    /// Whether the process is root, as far as users and owners are concerned.
    pub(super) fn is_root(&self) -> bool {
        self.user.effective == 0
    }

    /// Whether `gid` is one of the groups that count for files.
    pub(super) fn is_in(&self, gid: u32) -> bool {
        self.group.filesystem == gid || self.groups.contains(&gid)
    }

    /// Makes a change; returns what the call returns.
    ///
    /// # Errors
    /// `EPERM` where a process that is not root asks for what it is not.
    pub(super) fn change(&mut self, change: &Change) -> Result<u32, Errno> {
        let is_root = self.is_root();
        match change {
            Change::One(kind, id) => self.four(*kind).one(*id, is_root)?,
            Change::Two(kind, real, effective) => {
                self.four(*kind).two(*real, *effective, is_root)?;
            }
            Change::Three(kind, real, effective, saved) => {
                self.four(*kind).three(*real, *effective, *saved, is_root)?;
            }
            Change::Filesystem(kind, id) => return Ok(self.four(*kind).filesystem(*id, is_root)),
            Change::Groups(groups) if is_root => self.groups.clone_from(groups),
            Change::Groups(_) => return Err(Errno::PERM),
        }
        Ok(0)
    }

    /// The numbers of one kind.
    pub(super) fn four(&mut self, kind: Kind) -> &mut Four {
        match kind {
            Kind::User => &mut self.user,
            Kind::Group => &mut self.group,
        }
    }

    /// What executing a file makes of it: with this mode, of this owner.
    pub(super) fn execute(&mut self, mode: u32, uid: u32, gid: u32) {
        const SETUID: u32 = 0o4000;
        const SETGID_AND_EXECUTABLE: u32 = 0o2010;
        if mode & SETUID != 0 {
            self.user.effective = uid;
        }
        if mode & SETGID_AND_EXECUTABLE == SETGID_AND_EXECUTABLE {
            self.group.effective = gid;
        }
        for four in [&mut self.user, &mut self.group] {
            four.saved = four.effective;
            four.filesystem = four.effective;
        }
    }
}

impl Four {
    fn is_one_of(&self, id: u32) -> bool {
        [self.real, self.effective, self.saved].contains(&id)
    }

    fn one(&mut self, id: u32, is_root: bool) -> Result<(), Errno> {
        if is_root {
            (self.real, self.saved) = (id, id);
        } else if ![self.real, self.saved].contains(&id) {
            return Err(Errno::PERM);
        }
        (self.effective, self.filesystem) = (id, id);
        Ok(())
    }

    fn two(&mut self, real: u32, effective: u32, is_root: bool) -> Result<(), Errno> {
        let old = *self;
        let may_real = is_root || [KEEP, old.real, old.effective].contains(&real);
        let may_effective = is_root || effective == KEEP || old.is_one_of(effective);
        if !may_real || !may_effective {
            return Err(Errno::PERM);
        }
        if real != KEEP {
            self.real = real;
        }
        if effective != KEEP {
            self.effective = effective;
        }
        if real != KEEP || (effective != KEEP && effective != old.real) {
            self.saved = self.effective;
        }
        self.filesystem = self.effective;
        Ok(())
    }

    fn three(&mut self, real: u32, effective: u32, saved: u32, is_root: bool) -> Result<(), Errno> {
        let may = |id: u32| is_root || id == KEEP || self.is_one_of(id);
        if ![real, effective, saved].into_iter().all(may) {
            return Err(Errno::PERM);
        }
        let places = [
            (&mut self.real, real),
            (&mut self.effective, effective),
            (&mut self.saved, saved),
        ];
        for (place, id) in places {
            if id != KEEP {
                *place = id;
            }
        }
        self.filesystem = self.effective;
        Ok(())
    }

    /// Returns the old one, whether or not it was allowed.
    fn filesystem(&mut self, id: u32, is_root: bool) -> u32 {
        let old = self.filesystem;
        if is_root || self.is_one_of(id) || id == old {
            self.filesystem = id;
        }
        old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn four(real: u32, effective: u32, saved: u32, filesystem: u32) -> Four {
        Four {
            real,
            effective,
            saved,
            filesystem,
        }
    }

    fn of(user: Four) -> Ids {
        Ids {
            user,
            ..Ids::default()
        }
    }

    #[test]
    fn users_change_as_the_kernel_has_it() {
        let check = |from: Four, change: Change, want: Result<Four, Errno>| {
            let mut ids = of(from);
            let got = ids.change(&change).map(|_| ids.user);
            assert_eq!(got, want, "{from:?} {change:?}");
            if want.is_err() {
                assert_eq!(ids, of(from));
            }
        };
        let root = four(0, 0, 0, 0);
        let user = four(7, 7, 7, 7);
        // What `su` leaves, and what a setuid program is.
        let became = four(7, 0, 0, 0);
        use Change::{One, Three, Two};
        use Kind::User;
        check(root, One(User, 33), Ok(four(33, 33, 33, 33)));
        check(user, One(User, 7), Ok(user));
        check(user, One(User, 0), Err(Errno::PERM));
        check(became, One(User, 7), Ok(user));
        check(four(7, 7, 0, 7), One(User, 0), Ok(four(7, 0, 0, 0)));
        check(root, Two(User, KEEP, 5), Ok(four(0, 5, 5, 5)));
        check(root, Two(User, KEEP, 0), Ok(root));
        check(became, Two(User, 0, 7), Ok(four(0, 7, 7, 7)));
        check(user, Two(User, 8, KEEP), Err(Errno::PERM));
        check(user, Two(User, KEEP, KEEP), Ok(user));
        check(root, Three(User, 1, 2, 3), Ok(four(1, 2, 3, 2)));
        check(root, Three(User, KEEP, 100, KEEP), Ok(four(0, 100, 0, 100)));
        check(
            four(1, 2, 3, 2),
            Three(User, 3, 1, KEEP),
            Ok(four(3, 1, 3, 1)),
        );
        check(
            four(1, 2, 3, 2),
            Three(User, KEEP, 4, KEEP),
            Err(Errno::PERM),
        );
    }

    #[test]
    fn groups_are_roots_to_change_and_the_filesystems_user_is_told() {
        let mut ids = Ids::default();
        assert_eq!(ids.change(&Change::Groups(vec![4, 5])), Ok(0));
        assert_eq!(ids.change(&Change::One(Kind::Group, 9)), Ok(0));
        assert_eq!(ids.group, four(9, 9, 9, 9));
        assert!(ids.is_in(5) && ids.is_in(9) && !ids.is_in(0));
        assert_eq!(ids.change(&Change::Filesystem(Kind::User, 3)), Ok(0));
        assert_eq!(ids.change(&Change::Filesystem(Kind::User, 4)), Ok(3));
        ids.change(&Change::One(Kind::User, 8)).unwrap();
        assert_eq!(ids.change(&Change::Filesystem(Kind::User, 0)), Ok(8));
        assert_eq!(ids.user.filesystem, 8);
        assert_eq!(ids.change(&Change::Groups(vec![0])), Err(Errno::PERM));
        assert_eq!(ids.change(&Change::One(Kind::Group, 0)), Err(Errno::PERM));
    }

    #[test]
    fn setuid_programs_become_their_owner() {
        let user = four(7, 7, 7, 7);
        let mut ids = Ids {
            user,
            group: user,
            groups: vec![7],
        };
        ids.execute(0o755, 0, 0);
        assert_eq!((ids.user, ids.group), (user, user));
        ids.execute(0o4755, 0, 0);
        assert_eq!((ids.user, ids.group), (four(7, 0, 0, 0), user));
        // Without the right to execute, it is a lock and no permission.
        ids.execute(0o2745, 0, 5);
        assert_eq!(ids.group, user);
        ids.execute(0o2755, 0, 5);
        assert_eq!(ids.group, four(7, 5, 5, 5));
        assert_eq!(ids.groups, [7]);
    }
}
