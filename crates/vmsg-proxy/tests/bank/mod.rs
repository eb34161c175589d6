// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers of a device in the memory of this process, for drivers that know nothing of it.
//!
//! A bank is a range of addresses at which nothing is mapped. An access there faults; the handler decodes the instruction, does
//! what it says to the registers, and goes on behind it. Only moves are understood: they are what drivers use for registers.
#![allow(unreachable_pub, reason = "a part of a test program")]

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, Once, PoisonError};

/// What is behind an address.
pub trait Registers: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

type Shared = Arc<Mutex<dyn Registers>>;

/// The banks there are: first address, bytes, registers.
static BANKS: Mutex<Vec<(usize, usize, Shared)>> = Mutex::new(Vec::new());

thread_local! {
    /// A fault within the handler is a real one.
    static HANDLING: Cell<bool> = const { Cell::new(false) };
}

/// A range of addresses; gone when dropped.
pub struct Bank {
    start: NonNull<u8>,
    mapping: (*mut libc::c_void, usize),
}

impl Bank {
    /// `len` bytes, a power of two of at least a page, at a multiple of that, as BARs are.
    pub fn new(len: usize, registers: Shared) -> Bank {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(install);
        assert!(len.is_power_of_two() && len >= 4096);
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that is there.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let start = mapping.expose_provenance().next_multiple_of(len);
        banks(|banks| banks.push((start, len, registers)));
        Bank {
            start: NonNull::new(std::ptr::with_exposed_provenance_mut(start)).unwrap(),
            mapping: (mapping, 2 * len),
        }
    }

    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        let start = self.start.as_ptr().expose_provenance();
        banks(|banks| banks.retain(|bank| bank.0 != start));
        // SAFETY: the mapping is ours, and drivers of it are gone before it.
        unsafe { libc::munmap(self.mapping.0, self.mapping.1) };
    }
}

fn banks<T>(f: impl FnOnce(&mut Vec<(usize, usize, Shared)>) -> T) -> T {
    f(&mut BANKS.lock().unwrap_or_else(PoisonError::into_inner))
}

fn install() {
    // SAFETY: all fields of a `sigaction` may be 0; the handler has the type that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = (handle as extern "C" fn(_, _, _)) as usize;
        // On the stack of the thread: the one that Rust has for signals is too small for a device.
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()),
            0
        );
    }
}

/// The next access of this kind ends the program.
fn give_up() {
    // SAFETY: the default action needs nothing.
    unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO valid ones, and nobody else's while it runs.
    let (address, context) = unsafe {
        (
            (*info).si_addr() as usize,
            &mut *context.cast::<libc::ucontext_t>(),
        )
    };
    let bank = if HANDLING.replace(true) {
        None
    } else {
        // The fault is at an instruction of a driver, which holds no lock of ours.
        banks(|banks| {
            let mut banks = banks.iter();
            banks
                .find(|(start, len, _)| (*start..start + len).contains(&address))
                .map(|(start, _, registers)| ((address - start) as u64, registers.clone()))
        })
    };
    match bank {
        Some((offset, registers)) => {
            let mut registers = registers.lock().unwrap_or_else(PoisonError::into_inner);
            if !access(&mut context.uc_mcontext.gregs, offset, &mut *registers) {
                give_up();
            }
        }
        None => give_up(),
    }
    HANDLING.set(false);
}

type Gregs = [libc::greg_t; 23];

/// Does what the instruction says, and goes on behind it. False: it is not understood.
fn access(gregs: &mut Gregs, offset: u64, bank: &mut dyn Registers) -> bool {
    let rip = gregs[libc::REG_RIP as usize] as u64;
    // SAFETY: these bytes have just been executed. An instruction has at most 15; behind the last of a program there are others.
    let code =
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(rip as usize), 15) };
    let instruction = Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode();
    if !step(gregs, &instruction, offset, bank) {
        eprintln!("an access to a register by {:?}", instruction.code());
        return false;
    }
    true
}

fn step(
    gregs: &mut Gregs,
    instruction: &Instruction,
    offset: u64,
    bank: &mut dyn Registers,
) -> bool {
    let width = instruction.memory_size().size();
    let moves = matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx);
    if !moves || !matches!(width, 1 | 2 | 4 | 8) || instruction.code() == Code::INVALID {
        return false;
    }
    let mut data = [0; 8];
    if instruction.op0_kind() == OpKind::Memory {
        let value = match instruction.op1_kind() {
            OpKind::Register => {
                let Some(value) = place(instruction.op1_register()).map(|at| gregs[at]) else {
                    return false;
                };
                value as u64
            }
            _ => instruction.immediate(1),
        };
        data = value.to_le_bytes();
        bank.write(offset, &data[..width]);
    } else {
        let register = instruction.op0_register();
        let Some(at) = place(register) else {
            return false;
        };
        bank.read(offset, &mut data[..width]);
        let value = u64::from_le_bytes(data);
        // Writing a half clears the other one; writing less leaves the rest.
        let kept = match register.size() {
            1 => !0xff,
            2 => !0xffff,
            _ => 0,
        };
        gregs[at] = (gregs[at] as u64 & kept | value) as i64;
    }
    gregs[libc::REG_RIP as usize] = instruction.next_ip() as i64;
    true
}

/// Where a general-purpose register is saved. Of the oldest four the second byte is not understood.
fn place(register: Register) -> Option<usize> {
    if matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    ) || !register.is_gpr()
    {
        return None;
    }
    let at = match register.full_register() {
        Register::RAX => libc::REG_RAX,
        Register::RBX => libc::REG_RBX,
        Register::RCX => libc::REG_RCX,
        Register::RDX => libc::REG_RDX,
        Register::RSI => libc::REG_RSI,
        Register::RDI => libc::REG_RDI,
        Register::RBP => libc::REG_RBP,
        Register::R8 => libc::REG_R8,
        Register::R9 => libc::REG_R9,
        Register::R10 => libc::REG_R10,
        Register::R11 => libc::REG_R11,
        Register::R12 => libc::REG_R12,
        Register::R13 => libc::REG_R13,
        Register::R14 => libc::REG_R14,
        Register::R15 => libc::REG_R15,
        _ => return None,
    };
    usize::try_from(at).ok()
}
