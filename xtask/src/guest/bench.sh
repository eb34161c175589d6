# SPDX-License-Identifier: Apache-2.0 OR MIT
# TCP both ways between the guest and iperf3 at TRAFFIC (address and port); STATIC is the guest's address, or empty.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
ip link set eth0 down
if [ -n "$STATIC" ]; then
    ip link set eth1 up && ip addr add "$STATIC" dev eth1
else
    lease eth1
fi || fail "no address"
ping -q -c 1 "${TRAFFIC% *}" > /dev/null
traffic() {
    what=$1; shift
    iperf3 -c "${TRAFFIC% *}" -p "${TRAFFIC#* }" -f m "$@" > /tmp/iperf 2>&1 || fail "$what: $(tail -n 2 /tmp/iperf)"
    rate=$(grep receiver /tmp/iperf | tail -n 1 | sed 's/ Mbits.*//')
    mark rate "$what ${rate##* }"
}
traffic warm-up -t 1
traffic up -t 3
traffic down -t 3 -R
traffic up-8 -t 3 -P 8
traffic down-8 -t 3 -P 8 -R
# There and back, 200 times, each as soon as the one before is answered.
ping -q -A -c 200 "${TRAFFIC% *}" > /tmp/pings
rate=$(sed -n 's/^round-trip.*= [0-9.]*\/\([0-9.]*\)\/.*/\1/p' /tmp/pings)
mark rate "ping $rate"
