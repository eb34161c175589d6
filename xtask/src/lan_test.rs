// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

#[test]
fn each_round_trip_counts_and_a_duplicate_does_not() {
    let said = "PING 192.168.1.2 (192.168.1.2): 56 data bytes\n\
                64 bytes from 192.168.1.2: seq=0 ttl=64 time=4.000 ms\n\
                64 bytes from 192.168.1.2: seq=1 ttl=64 time=1.000 ms\n\
                64 bytes from 192.168.1.2: seq=1 ttl=64 time=9.000 ms (DUP!)\n\
                64 bytes from 192.168.1.2: seq=2 ttl=64 time=2.500 ms\n\n\
                --- 192.168.1.2 ping statistics ---\n\
                3 packets transmitted, 3 packets received, 1 duplicates, 0% packet loss\n\
                round-trip min/avg/max = 1.000/2.500/4.000 ms";
    let pings = Pings::parse(&lines(said)).expect("what ping says");
    assert!(pings.all() && !pings.none());
    assert_eq!((pings.mean(), pings.median()), (2.5, 2.5));
    assert_eq!(
        pings.to_string(),
        "min 1.000, median 2.500, avg 2.500, max 4.000 ms (3 of 3 answered)"
    );
}

#[test]
fn silence_is_not_what_a_broken_ping_says() {
    let silent = "PING 192.168.1.2 (192.168.1.2): 56 data bytes\n\
                  3 packets transmitted, 0 packets received, 100% packet loss";
    let pings = Pings::parse(&lines(silent)).expect("what ping says");
    assert!(pings.none() && !pings.all());
    assert_eq!(
        Pings::parse(&lines("ping: sendto: Network is unreachable")),
        None
    );
}
