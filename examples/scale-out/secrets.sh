#!/bin/sh
# Print fresh secrets. compose.yaml and kustomization.yaml read them from the file .env.
set -eu

fresh() { # 32 digits: consent.key has to be of 32 bytes
    head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

password=$(fresh)
cat <<EOF
POSTGRES_PASSWORD=$password
OSP_STORE=postgresql://osp:$password@postgres:5432/osp
OSP_KEY_LAPTOP=osp-$(fresh)
OSP_KEY_PHONE=osp-$(fresh)
OSP_CONSENT=$(fresh)
EOF
