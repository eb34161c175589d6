# SPDX-License-Identifier: Apache-2.0 OR MIT
# Before all else: is it the first boot or the one after? A guest that has rebooted looks whether all is as new.
mark turn
read -r turn
if [ "$turn" = second ]; then
    name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC after the reboot"
    check rebooted-dhcp lease eth1
    check rebooted-ping ping -q -c 5 -i 0.1 10.0.2.2
    fetched() { wget -q -O - "http://10.0.2.2:$PORT/file" | sha256sum | grep -q "$SUM"; }
    check rebooted-http fetched
    random() { [ "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" = 1024 ]; }
    check rebooted-rng random
    return 0
fi
