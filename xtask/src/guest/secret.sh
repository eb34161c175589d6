# SPDX-License-Identifier: Apache-2.0 OR MIT
# Memory full of a secret that is never sent (SECRET, in hex), and a token that is sent (TOKEN, text). With exercises.sh.
printf "$(echo "$SECRET" | sed 's/../\\x&/g')" > /tmp/secret
for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
    cat /tmp/secret /tmp/secret > /tmp/twice && mv /tmp/twice /tmp/secret
done
cp /tmp/secret /tmp/copy
sum=$(sha256sum < /tmp/secret)
check secret-planted is "$(wc -c < /tmp/secret)" 4194304
mark planted
read -r answer
# What is freed is what the kernel takes next, for buffers too.
rm /tmp/copy
fetch /tmp/file &
mark fetching
read -r answer
wait
yes "$TOKEN" | head -c 1048576 > /tmp/up
check token-sent is "$(wget -q -O - --post-file=/tmp/up "$host/sum")" "$(sha256sum < /tmp/up | cut -c 1-64)"
rm /tmp/up
check secret-rng random 64
ping -q -c 3 -i 0.1 10.0.2.2 > /dev/null
mark sent
read -r answer
check secret-kept is "$(sha256sum < /tmp/secret)" "$sum"
