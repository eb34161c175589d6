// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The window that the guest gets, while the host's peer reads nothing.

use std::io::Write;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use rustix::event::Timespec;
use rustix::event::epoll;

use super::super::config::UserConfig;
use super::super::net::Source;
use super::*;

/// Looks after all events; returns how often there were some before there were none.
fn wakes(tcp: &mut Tcp, net: &mut Net) -> usize {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    for count in 0..1000 {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
        let (events, _) = epoll::wait(&net.epoll, &mut events, Some(&at_once)).unwrap();
        if events.is_empty() {
            return count;
        }
        for event in events.iter() {
            if let Some(Source::Tcp(key)) = Source::from_event(event.data) {
                tcp.event(net, Instant::now(), key, event.flags);
            }
        }
    }
    1000
}

/// Whatever fits into the socket's buffer, and however it got there: once it has been looked at,
/// there is nothing to do until somebody does something.
#[test]
fn no_fill_of_a_sockets_buffer_keeps_the_stack_awake() {
    for (buffer, step) in [(4608, 16), (8192, 100), (8192, 1000), (40_000, 160)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 2304).unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _silent = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, buffer).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut net = Net::new(UserConfig::default()).unwrap();
        let mut tcp = Tcp::new(&Limits::default());
        let guest = SocketAddr::new(Ipv4Addr::new(10, 0, 2, 15).into(), 80);
        let client = listener.local_addr().unwrap();
        let flows = socket.as_fd().try_clone_to_owned().unwrap();
        assert!(tcp.call(&mut net, Instant::now(), flows, client, guest));
        let key = tcp.flows.keys()[0];
        {
            let flow = tcp.flows.get_mut(key).unwrap();
            flow.phase = Phase::Open;
            flow.fixed.mss = 1460;
            flow.fixed.our_scale = 8;
        }
        loop {
            let flow = tcp.flows.get_mut(key).unwrap();
            flow.open_window(&net);
            let count = wakes(&mut tcp, &mut net);
            let flow = tcp.flows.get_mut(key).unwrap();
            let left = flow.rcv_edge.after(flow.rcv_nxt);
            eprintln!(
                "{buffer} left {left} count {count} awaits {}",
                flow.awaits_room
            );
            assert!(count < 10, "{count} times, window {left}, buffer {buffer}");
            let Ok(n) = socket.write(&vec![7; step]) else {
                break;
            };
            flow.rcv_nxt = flow.rcv_nxt.plus(u32::try_from(n).unwrap());
            if flow.rcv_edge.since(flow.rcv_nxt) < 0 {
                flow.rcv_edge = flow.rcv_nxt;
            }
        }
    }
}
