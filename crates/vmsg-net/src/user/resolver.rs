// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which name servers the host asks.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Instant, SystemTime};

use super::config::UserConfig;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// As many as the C library uses.
pub(super) const MAX_SERVERS: usize = 3;

/// The name servers, one of which is in use.
#[derive(Debug)]
pub(super) struct Resolvers {
    servers: Vec<SocketAddr>,
    current: usize,
    fixed: bool,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
}

impl Resolvers {
    pub(super) fn new(config: &UserConfig) -> Self {
        Self {
            servers: config.resolvers.clone(),
            current: 0,
            fixed: !config.resolvers.is_empty(),
            changed: None,
            looked: None,
        }
    }

    /// The server to ask now. /etc/resolv.conf is looked at no more than once a second.
    pub(super) fn current(&mut self, now: Instant) -> SocketAddr {
        let due = self
            .looked
            .is_none_or(|looked| now.saturating_duration_since(looked).as_secs() >= 1);
        if !self.fixed && due {
            self.looked = Some(now);
            let changed = fs::metadata(RESOLV_CONF)
                .and_then(|file| file.modified())
                .ok();
            if self.servers.is_empty() || changed != self.changed {
                self.changed = changed;
                self.servers = parse(&fs::read_to_string(RESOLV_CONF).unwrap_or_default());
                self.current = 0;
            }
        }
        self.servers
            .get(self.current)
            .copied()
            .unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 53))
    }

    /// `server` does not answer: the next question goes to the next one, if `server` is the one
    /// in use still.
    pub(super) fn fail(&mut self, server: SocketAddr) {
        if self.servers.get(self.current) == Some(&server) {
            self.current = (self.current + 1) % self.servers.len();
        }
    }
}

/// The servers that resolv.conf(5) names.
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then_some(())?;
            // A link-local address with a scope cannot be used without its interface.
            Some(SocketAddr::new(words.next()?.parse().ok()?, 53))
        })
        .take(MAX_SERVERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_found_and_the_rest_is_passed_over() {
        let text = "# nameserver 9.9.9.9\nsearch a b\nnameserver 1.2.3.4\n nameserver\t::1 \n\
                    nameserver fe80::1%eth0\nnameserver x\noptions ndots:2\n";
        assert_eq!(
            parse(text),
            ["1.2.3.4:53".parse().unwrap(), "[::1]:53".parse().unwrap()]
        );
    }

    #[test]
    fn a_silent_server_makes_way_for_the_next() {
        let servers = [
            "1.2.3.4:53".parse().unwrap(),
            "5.6.7.8:5353".parse().unwrap(),
        ];
        let mut resolvers = Resolvers::new(&UserConfig {
            resolvers: servers.to_vec(),
            ..UserConfig::default()
        });
        let now = Instant::now();
        assert_eq!(resolvers.current(now), servers[0]);
        resolvers.fail(servers[0]);
        assert_eq!(resolvers.current(now), servers[1]);
        resolvers.fail(servers[0]);
        assert_eq!(resolvers.current(now), servers[1], "known already");
        resolvers.fail(servers[1]);
        assert_eq!(resolvers.current(now), servers[0]);
    }
}
