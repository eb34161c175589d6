# SPDX-License-Identifier: Apache-2.0 OR MIT
# Everything a network device can do: offloads, queue pairs, large frames, VLAN, IPv6, many connections, the link.
# Settings: VIA (generic: the control queue reaches vmsg; vhost-user: QEMU keeps it), PAIRS, MTU, TRAFFIC (address and
# port of iperf3, or empty), OFFLOADS (on, off), GATEWAY, GATEWAY6, STATIC and STATIC6 (addresses, where nobody
# gives any).
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
ip link set eth0 down

holds() { case $1 in *"$2"*) ;; *) echo "$1 without $2"; return 1 ;; esac; }
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
up() {
    ip link set eth1 up
    [ -z "$STATIC6" ] || /bin/ip -6 addr replace "$STATIC6" dev eth1 nodad || return 1
    if [ -n "$STATIC" ]; then ip link set eth1 up && ip addr replace "$STATIC" dev eth1; else lease eth1; fi
}
carrier() { [ "$(cat /sys/class/net/eth1/carrier 2> /dev/null)" = "$1" ]; }
offload() { holds "$(ethtool -k eth1 | sed 's/^\t*//')" "$1: $2"; }
pairs() { holds "$(ethtool -l eth1 | tail -n 5 | tr -d '\t ')" "Combined:$1"; }
set_pairs() { ethtool -L eth1 combined "$1" && pairs "$1"; }
pings() { ping -q -c "${2:-3}" -i 0.1 "$1" > /tmp/pings && grep -q ' 0% packet loss' /tmp/pings || { cat /tmp/pings; return 1; }; }
large() { ping -q -c 3 -i 0.2 -s "$1" "$GATEWAY" > /tmp/pings && grep -q ' 0% packet loss' /tmp/pings || { cat /tmp/pings; return 1; }; }
bounce() {
    for n in 1 2 3; do
        ip link set eth1 down && up && pings "$GATEWAY" 1 || return 1
    done
}
has6() { ip -6 addr show dev eth1 scope global | grep -v tentative | grep -q inet6; }
vlan() {
    ip link add link eth1 name eth1.5 type vlan id 5 && ip link set eth1.5 up && ip addr add 192.168.5.1/24 dev eth1.5 &&
        { ping -q -c 2 -i 0.2 -W 1 192.168.5.2 > /dev/null; ip -s link show eth1.5 > /tmp/vlan; ip link del eth1.5; }
}
queues_used() {
    n=0
    for q in /sys/class/net/eth1/queues/rx-*; do n=$((n + 1)); done
    is "$n" "$1"
}
# traffic NAME ARGUMENTS…: iperf3 with them; prints the sums.
traffic() {
    what=$1; shift
    if iperf3 -c "${TRAFFIC% *}" -p "${TRAFFIC#* }" -f m "$@" > /tmp/iperf 2>&1; then
        mark traffic "$what $(grep -E '(SUM|\[  5\]).*(receiver)' /tmp/iperf | tail -n 1)"
    else
        tail -n 5 /tmp/iperf; return 1
    fi
}
clean_log() {
    said=$(dmesg | grep -E 'BUG:|WARNING:|Call Trace|Oops|timed out|virtio.*([Ff]ail|[Ee]rror)|is not a head|id .* out of range')
    [ -z "$said" ] || { echo "$said"; return 1; }
}

check up up
check ping pings "$GATEWAY"
for name in tx-checksumming tx-tcp-segmentation tx-tcp6-segmentation; do
    check "offload-$name" offload "$name" "$OFFLOADS"
done
mark features "$(cat /sys/class/net/eth1/device/features)"
check pairs pairs "$PAIRS"
if [ "$PAIRS" -gt 1 ]; then
    check pairs-one set_pairs 1
    check pairs-one-ping pings "$GATEWAY"
    check pairs-all set_pairs "$PAIRS"
    check pairs-all-ping pings "$GATEWAY"
fi
check bounce bounce
if [ "$OFFLOADS" = on ]; then
    check offloads-off ethtool -K eth1 tso off tx off gso off
    check offloads-off-ping pings "$GATEWAY"
    check offloads-on ethtool -K eth1 tx on tso on gso on
fi
if [ "$MTU" -gt 1500 ]; then
    check mtu ip link set eth1 mtu "$MTU"
    check mtu-ping large $((MTU - 28))
    check mtu-back ip link set eth1 mtu 1500
fi
check ping-fragments large 4000
check vlan vlan
if [ -n "$GATEWAY6" ]; then
    check ipv6-address await 15 has6
    check ipv6-ping pings "$GATEWAY6"
fi
if [ "$VIA" = generic ]; then
    check rss-key holds "$(ethtool -x eth1)" 'RSS hash key'
    check rss-one ethtool -X eth1 weight 1 0
    check rss-one-ping pings "$GATEWAY"
    check rss-equal ethtool -X eth1 equal "$PAIRS"
    check rss-equal-ping pings "$GATEWAY"
    check rss-fields holds "$(ethtool -n eth1 rx-flow-hash tcp4)" 'L4 bytes'
    check hash-off ethtool -K eth1 rxhash off
    check hash-on ethtool -K eth1 rxhash on
    check hash-on-ping pings "$GATEWAY"
    check promisc /bin/ip link set eth1 promisc on
    check promisc-off /bin/ip link set eth1 promisc off
    check allmulti /bin/ip link set eth1 allmulticast on
    check allmulti-off /bin/ip link set eth1 allmulticast off
    check address ip link set eth1 address 52:54:00:76:6d:77
    check address-ping pings "$GATEWAY"
    check address-back ip link set eth1 address "$TEST_MAC"
    check address-back-ping pings "$GATEWAY"
fi
if [ -n "$LINK" ]; then
    mark link-down
    check link-down await 20 carrier 0
    mark link-up
    check link-up await 20 carrier 1
    check link-up-again up
    check link-up-ping pings "$GATEWAY"
fi
if [ -n "$LINK" ]; then
    ping -i 0.1 "$GATEWAY" > /tmp/pings &
    await 5 grep -q 'seq=3 ' /tmp/pings
    mark kill
    read -r answer
    lines=$(grep -c 'bytes from' /tmp/pings)
    goes_on() { [ "$(grep -c 'bytes from' /tmp/pings)" -gt $((lines + 2)) ]; }
    check killed-ping await 20 goes_on
    kill %1
    check killed-pairs set_pairs "$PAIRS"
    check killed-bounce bounce
fi
if [ -n "$TRAFFIC" ]; then
    check tcp-up traffic tcp-up -t 2
    check tcp-down traffic tcp-down -t 2 -R
    check tcp-64-up traffic tcp-64-up -P 64 -t 3
    check tcp-64-down traffic tcp-64-down -P 64 -t 3 -R
    check udp-64-up traffic udp-64-up -u -P 64 -b 200K -l 1200 -t 3
    check udp-64-down traffic udp-64-down -u -P 64 -b 200K -l 1200 -t 3 -R
    check ping-after pings "$GATEWAY"
fi
check kernel-log clean_log
