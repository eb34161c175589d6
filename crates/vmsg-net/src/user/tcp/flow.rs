// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known about one TCP connection: no payload.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::super::config::Limits;
use super::super::line::Share;
use super::super::net::{Net, Source};
use super::segment::{Flags, Out, Seq};
use crate::sys;

/// Both ends of a connection as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tuple {
    pub(super) guest: SocketAddr,
    pub(super) peer: SocketAddr,
}

impl Tuple {
    pub(super) const fn new(guest: IpAddr, gport: u16, peer: IpAddr, pport: u16) -> Self {
        Self {
            guest: SocketAddr::new(guest, gport),
            peer: SocketAddr::new(peer, pport),
        }
    }
}

/// How far a connection is. What is closed is told by [`Flow::guest_fin`] and [`Flow::fin_at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest's SYN has come, the host connects.
    Connecting,
    /// The host has connected, our SYN-ACK waits for the guest's ACK.
    Answering,
    /// A client of the host has come, our SYN waits for the guest's SYN-ACK.
    Calling,
    /// Open, or half closed.
    Open,
    /// All is done; stays for a while in case our last ACK got lost.
    Lingering,
}

/// What does not change once the connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    pub(super) tuple: Tuple,
    /// Our first sequence number.
    pub(super) iss: Seq,
    /// The guest's.
    pub(super) irs: Seq,
    /// Shift of the windows that we advertise.
    pub(super) our_scale: u8,
    /// Shift of those of the guest.
    pub(super) guest_scale: u8,
    /// Payload of the largest segment that the guest takes.
    pub(super) mss: u16,
    /// `tcpi_bytes_acked` of the socket before anything was written: 1 if the host counts its SYN.
    pub(super) acked_base: u8,
}

/// Whose business a connection is after it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Keep,
    /// The guest has confirmed: from now on it outlives us.
    Opened,
    /// Both directions are closed and confirmed.
    Finished,
    /// Broken from the guest's side: the host's end is to be reset.
    ResetHost,
    /// Broken: both ends are to be reset.
    ResetBoth,
}

/// First and longest retransmission timeouts (RFC 6298; the shortest as Linux has it).
pub(super) const RTO_FIRST: Duration = Duration::from_secs(1);
pub(super) const RTO_MIN: Duration = Duration::from_millis(200);
pub(super) const RTO_MAX: Duration = Duration::from_secs(30);
/// How often in a row a segment is sent in vain.
pub(super) const RETRIES: u8 = 15;
/// How long a closed connection answers.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// Scale of our windows: enough for 16 MiB.
pub(super) const OUR_SCALE: u8 = 8;
/// MSS of a guest that does not tell (RFC 9293, 3.7.1), and the smallest we put up with.
pub(super) const MSS_DEFAULT: u16 = 536;
pub(super) const MSS_DEFAULT6: u16 = 1220;
pub(super) const MSS_MIN: u16 = 64;

/// One connection.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) source: Source,
    pub(super) fixed: Fixed,
    pub(super) phase: Phase,
    /// The host's end; `None` once it is closed.
    pub(super) socket: Option<OwnedFd>,
    /// What the keeper of flows calls it; 0 before it was given away.
    pub(super) key: u64,

    // To the guest.
    /// First byte the guest has not acknowledged: the first one that waits in the socket.
    pub(super) snd_una: Seq,
    /// Next byte to be sent.
    pub(super) snd_nxt: Seq,
    /// Behind the last one that may ever have been sent.
    pub(super) snd_max: Seq,
    /// Bytes the guest takes from `snd_una` on.
    pub(super) snd_wnd: u32,
    /// Bytes we dare to have on the way after a timeout; else as many as configured.
    pub(super) cwnd: u32,
    /// From where the next peek of the socket reads; `None` if that is not known.
    pub(super) peek_at: Option<Seq>,
    /// The socket may hold more than was sent.
    pub(super) readable: bool,
    /// The host has said that it sends no more.
    pub(super) host_closed: bool,
    /// Where the FIN to the guest stands, once that is known.
    pub(super) fin_at: Option<Seq>,
    pub(super) dup_acks: u8,
    /// Set while lost segments are sent again: where that ends.
    pub(super) recover: Option<Seq>,
    /// The segment at `snd_una` is to be sent again.
    pub(super) resend: bool,
    /// The window is closed, and it is time to ask whether it still is.
    pub(super) probe: bool,

    // From the guest.
    pub(super) rcv_nxt: Seq,
    /// Right edge of the window we have advertised.
    pub(super) rcv_edge: Seq,
    /// The guest's FIN has come and was passed on.
    pub(super) guest_fin: bool,
    /// An ACK is to be sent, with a window as it is then.
    pub(super) ack_due: bool,
    /// So many ACKs are to be sent that say the same as the last one.
    pub(super) dups_due: u8,
    /// The guest sent more than the kernel took.
    pub(super) overrun: bool,
    /// How far it goes what was dropped and has to be sent again.
    pub(super) dropped_to: Option<Seq>,
    /// An event will tell when the socket takes more.
    pub(super) awaits_room: bool,

    /// A SYN or SYN-ACK is to be sent.
    pub(super) syn_due: bool,
    /// Its part in the line of who has something for the guest.
    pub(super) share: Share,
    /// The guest's queue pair that it is on.
    pub(super) pair: u16,
    /// Payload of the largest segment that gets through to the guest; less than what it takes
    /// where a router behind it has said so.
    pub(super) mss: u16,

    // Time.
    pub(super) rto: Duration,
    pub(super) srtt: Option<(Duration, Duration)>,
    /// A byte whose acknowledgement is timed, and when it was sent.
    pub(super) timed: Option<(Seq, Instant)>,
    pub(super) retries: u8,
    pub(super) rto_at: Option<Instant>,
    pub(super) idle_since: Instant,
    /// Our entry among the timers.
    pub(super) timer: Option<Instant>,
}

impl Flow {
    pub(super) fn new(
        source: Source,
        fixed: Fixed,
        phase: Phase,
        socket: OwnedFd,
        limits: &Limits,
        now: Instant,
    ) -> Self {
        Self {
            source,
            fixed,
            phase,
            socket: Some(socket),
            key: 0,
            snd_una: fixed.iss,
            snd_nxt: fixed.iss,
            snd_max: fixed.iss,
            snd_wnd: 0,
            cwnd: limits.tcp_in_flight,
            peek_at: None,
            readable: false,
            host_closed: false,
            fin_at: None,
            dup_acks: 0,
            recover: None,
            resend: false,
            probe: false,
            rcv_nxt: fixed.irs.plus(1),
            rcv_edge: fixed.irs.plus(1),
            guest_fin: false,
            ack_due: false,
            dups_due: 0,
            overrun: false,
            dropped_to: None,
            awaits_room: false,
            syn_due: false,
            share: Share::default(),
            pair: 0,
            mss: fixed.mss,
            rto: RTO_FIRST,
            srtt: None,
            timed: None,
            retries: 0,
            rto_at: None,
            idle_since: now,
            timer: None,
        }
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// What a socket of a flow is watched for, always by edges.
    pub(super) const EVENTS: EventFlags = EventFlags::IN
        .union(EventFlags::OUT)
        .union(EventFlags::RDHUP)
        .union(EventFlags::ET);

    /// Gets in line for the guest.
    pub(super) fn enqueue(&mut self, net: &mut Net) {
        net.join(self.source, &mut self.share);
    }

    /// The guest has acknowledged our FIN.
    pub(super) fn fin_acked(&self) -> bool {
        self.fin_at.is_some_and(|at| self.snd_una.since(at) > 0)
    }

    /// Bytes on the way to the guest.
    pub(super) fn in_flight(&self) -> u32 {
        self.snd_nxt.after(self.snd_una)
    }

    /// A segment to the guest as things stand; its window is the one advertised last.
    pub(super) fn out(&self, seq: Seq, flags: Flags) -> Out {
        Out {
            tuple: self.fixed.tuple,
            seq,
            ack: self.rcv_nxt,
            flags,
            window: self.window_field(),
            options: None,
            mss: self.mss,
            pair: self.pair,
        }
    }

    fn window_field(&self) -> u16 {
        let window = self.rcv_edge.after(self.rcv_nxt) >> self.fixed.our_scale;
        u16::try_from(window).unwrap_or(u16::MAX)
    }

    /// Moves the right edge of our window to what the socket takes now; the edge never moves
    /// back. If that is little, an event is asked for that tells when it becomes more.
    pub(super) fn open_window(&mut self, net: &Net) {
        // Not by `fd()`, which would borrow all of it.
        let Some(socket) = &self.socket else { return };
        let fd = socket.as_fd();
        if self.guest_fin {
            return;
        }
        let size = rustix::net::sockopt::socket_send_buffer_size(fd).unwrap_or(0);
        let used = sys::unacknowledged(fd).unwrap_or(u64::MAX);
        // The kernel counts its own overhead: about so much is left for payload.
        let capacity = (size as u64) / 4 * 3;
        let largest = u64::from(u16::MAX) << self.fixed.our_scale;
        // Nothing here exceeds `largest`, 65535 << 14.
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX >> 1);
        let unit = 1u32 << self.fixed.our_scale;
        let free = narrow(capacity.saturating_sub(used).min(largest)) / unit * unit;
        let edge = self.rcv_nxt.plus(free);
        let left = self.rcv_edge.after(self.rcv_nxt);
        // No silly windows: a step is worth a segment, or what a small buffer can give.
        let step = u32::from(self.fixed.mss)
            .min(narrow((capacity / 16).min(65535)))
            .max(1);
        if edge.since(self.rcv_edge) >= step.cast_signed() || (left == 0 && free > 0) {
            self.rcv_edge = edge;
        }
        // The kernel tells when a third of the buffer is free: then this much of our share is.
        let enough = narrow((capacity / 9).min(largest / 2));
        if self.rcv_edge.after(self.rcv_nxt) < enough && !self.awaits_room {
            self.awaits_room = true;
            net.watch_again(fd, self.source, Self::EVENTS);
        }
    }

    /// When this flow wants to be looked at.
    pub(super) fn deadline(&self, limits: &Limits) -> Instant {
        let idle = match self.phase {
            Phase::Connecting | Phase::Answering | Phase::Calling => limits.tcp_connect,
            Phase::Open if self.guest_fin || self.host_closed => limits.tcp_half_closed_idle,
            Phase::Open => limits.tcp_idle,
            Phase::Lingering => LINGER,
        };
        let idle = self.idle_since + idle;
        self.rto_at.map_or(idle, |at| at.min(idle))
    }

    /// Notes the deadline with the timers.
    pub(super) fn arm(&mut self, net: &mut Net) {
        let at = self.deadline(&net.config.limits);
        net.timers.set(self.source, &mut self.timer, at);
    }
}
