# SPDX-License-Identifier: Apache-2.0 OR MIT
# The guest at the other end: has an address, answers pings, serves iperf3 until the host says that it is over.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
ip link set eth0 down
ip link set lo up
ip link set eth1 up
ip addr add "$STATIC" dev eth1
iperf3 -s -p 5201 > /dev/null 2>&1 &
await 20 grep -q :1451 /proc/net/tcp6 || fail "iperf3 does not listen"
mark serving
read -r answer
mark asked
check peer-received [ "$(cat /sys/class/net/eth1/statistics/rx_packets)" -gt 10 ]
