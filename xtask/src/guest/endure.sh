# SPDX-License-Identifier: Apache-2.0 OR MIT
# Pings and downloads at the same time while the host does things to the other side, until the host says so. With
# ENTROPY=read it reads random numbers all the time, too.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
lease eth1 || fail "no address by DHCP"
rm -f /tmp/file
carrier=$(cat /sys/class/net/eth1/carrier_changes)
ping -i 0.2 10.0.2.2 &
ping=$!
download() {
    tries=1
    until wget -q -c -O /tmp/file "http://10.0.2.2:$PORT/file"; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || break
    done
    mark fetched $tries
}
download &
keep_reading() {
    while [ -e /tmp/reading ]; do dd if=/dev/hwrng of=/dev/null bs=64 count=16 2> /dev/null; done
}
if [ "$ENTROPY" = read ]; then
    : > /tmp/reading
    keep_reading &
fi
mark under-way
read -r answer
rm -f /tmp/reading
kill -INT $ping
wait
sum() { sha256sum < /tmp/file | grep -q "$SUM"; }
check checksum sum
check lease-kept [ "$(address_of eth1)" = 10.0.2.15 ]
[ "$LINK" = flaps ] || check carrier-kept [ "$(cat /sys/class/net/eth1/carrier_changes)" = "$carrier" ]
random() { [ "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" = 1024 ]; }
check rng random
check ping-after ping -q -c 5 -i 0.1 10.0.2.2
