#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Makes the certificates of tests/test_live_wire.py anew (OpenSSL 3): valid from 2020 to 2100, for tests only, for the
# private keys lie here for everybody to read. ca.pem signed target.pem (for localhost) and source.pem; other-ca.pem signed
# other.pem, which nobody trusts.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

sign() { # CA's name, its key, subject, its certificate, extensions, self-signed or not
	: > "$work/index"
	cat > "$work/conf" <<-EOF
		[ca]
		default_ca = one
		[one]
		database = $work/index
		new_certs_dir = $work
		rand_serial = yes
		default_md = sha256
		policy = any
		x509_extensions = extensions
		[any]
		commonName = supplied
		[extensions]
		$5
	EOF
	openssl req -new -key "$3" -subj "/CN=proto-v3 test $(basename "$4" .pem)" -out "$work/csr"
	openssl ca -batch -notext -config "$work/conf" -startdate 20200101000000Z -enddate 21000101000000Z \
		-keyfile "$2" $1 -in "$work/csr" -out "$4" 2>/dev/null
}

for ca in ca other-ca; do
	key "$work/$ca.key"
	sign -selfsign "$work/$ca.key" "$work/$ca.key" "$ca.pem" 'basicConstraints = critical,CA:true
keyUsage = critical,keyCertSign'
done
for name in target source other; do
	ca=ca
	[ $name != other ] || ca=other-ca
	key "$name.key"
	names='subjectAltName = DNS:localhost,IP:127.0.0.1,IP:::1'
	[ $name != source ] || names='subjectAltName = DNS:source.example'
	sign "-cert $ca.pem" "$work/$ca.key" "$name.key" "$name.pem" "$names"
done
