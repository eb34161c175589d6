# SPDX-License-Identifier: Apache-2.0 OR MIT
# A guest that follows another: the same devices must be as new.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
check dhcp lease eth1
check ping ping -q -c 5 -i 0.1 10.0.2.2
fetch() { wget -q -O - "http://10.0.2.2:$PORT/file" | sha256sum | grep -q "$SUM"; }
check http fetch
random() { [ "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" = 1024 ]; }
check rng random
mark waiting
# A test may pull the plug here instead of answering.
read -r answer
