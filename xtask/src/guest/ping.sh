# SPDX-License-Identifier: Apache-2.0 OR MIT
# Pings GATEWAY for as long as it lives, and says once a second that it lives.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
lease eth1 || fail "no address by DHCP"
mark pinging
ping -i 0.2 "$GATEWAY" &
while :; do
    sleep 1
    mark alive
done
