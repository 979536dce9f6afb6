//! [`Registers`]: where a system call's number, arguments and result are; see `syscall(2)`.

/// The registers of one thread, at the begin or end of a system call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registers(pub(super) libc::user_regs_struct);

/// A system call: number and arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) arguments: [u64; 6],
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::{Call, Registers};

    /// Bytes of the instruction that makes a call.
    const INSTRUCTION: u64 = 2;

    impl Registers {
        /// The call that is begun or was made.
        pub(in super::super) fn call(&self) -> Call {
            let regs = &self.0;
            Call {
                number: regs.orig_rax.cast_signed(),
                arguments: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
            }
        }

        fn set_arguments(&mut self, arguments: [u64; 6]) {
            let regs = &mut self.0;
            [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = arguments;
        }

        /// At the begin of a call: makes it this one.
        pub(in super::super) fn replace(&mut self, call: Call) {
            self.0.orig_rax = call.number.cast_unsigned();
            self.set_arguments(call.arguments);
        }

        /// At the end of a call: goes back, and makes this one.
        pub(in super::super) fn again(&mut self, call: Call) {
            self.0.rax = call.number.cast_unsigned();
            self.0.rip -= INSTRUCTION;
            self.set_arguments(call.arguments);
        }

        pub(in super::super) fn result(&self) -> i64 {
            self.0.rax.cast_signed()
        }

        pub(in super::super) fn set_result(&mut self, result: i64) {
            self.0.rax = result.cast_unsigned();
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod machine {
    use super::{Call, Registers};

    const INSTRUCTION: u64 = 4;

    impl Registers {
        /// The call that is begun. At its end, the first argument is the result.
        pub(in super::super) fn call(&self) -> Call {
            let regs = &self.0.regs;
            Call {
                number: regs[8].cast_signed(),
                arguments: [regs[0], regs[1], regs[2], regs[3], regs[4], regs[5]],
            }
        }

        fn set(&mut self, call: Call) {
            self.0.regs[..6].copy_from_slice(&call.arguments);
            self.0.regs[8] = call.number.cast_unsigned();
        }

        /// At the begin of a call: makes it this one; the kernel is told its number apart.
        pub(in super::super) fn replace(&mut self, call: Call) {
            self.set(call);
        }

        /// At the end of a call: goes back, and makes this one.
        pub(in super::super) fn again(&mut self, call: Call) {
            self.0.pc -= INSTRUCTION;
            self.set(call);
        }

        pub(in super::super) fn result(&self) -> i64 {
            self.0.regs[0].cast_signed()
        }

        pub(in super::super) fn set_result(&mut self, result: i64) {
            self.0.regs[0] = result.cast_unsigned();
        }
    }
}
