# SPDX-License-Identifier: Apache-2.0 OR MIT
# An address from passt, and files through it. It answers no pings where the host lets nobody have ping sockets.
name_nic "$OWN_MAC" eth0 || fail "no network device with the address $OWN_MAC"
name_nic "$TEST_MAC" eth1 || fail "no network device with the address $TEST_MAC"
is() { [ "$1" = "$2" ] || { echo "$1 instead of $2"; return 1; }; }
fetch() { wget -q -O /tmp/file "http://10.11.0.2:$PORT/file" && is "$(sha256sum < /tmp/file)" "$SUM  -"; }
upload() {
    head -c 2097152 /tmp/file | base64 > /tmp/up || return 1
    is "$(wget -q -O - --post-file=/tmp/up "http://10.11.0.2:$PORT/sum")" "$(sha256sum < /tmp/up | cut -c 1-64)"
}
check dhcp lease eth1
check dhcp-address is "$(address_of eth1)" 10.11.0.15
check http fetch
check upload upload
mark kill
read -r answer
check http-again await 30 fetch
