"""Secrets are told by their names and by their place in a URL, and ordinary names are not taken for them."""

from __future__ import annotations

import pytest

from tunefleet.secret_names import is_secret, secret_keys, url_with_user

SECRETS = [
    *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "DB_PASS", "DB_PWD", "MY_PASSWORD"),
    *("_redis_password", "dbPassword", "apiKey", "AZURE_STORAGE_KEY", "AUTH_KEY", "mysql-passwd", "CLIENT_SECRET"),
]
ORDINARY = [
    *("learning_rate", "tokenized_path", "max_tokens", "MAX_TOKENS", "num_tokens", "TOKENIZERS_PARALLELISM", "PWD"),
    *("OLDPWD", "key", "monkey", "KEYS", "bypass", "compass", "_temp_dir", "object_store_memory", "RAY_AUTH_MODE"),
    *("num_passes", "GOOGLE_APPLICATION_CREDENTIALS", "secretary"),
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_told_by_its_name(name: str) -> None:
    assert is_secret(name)
    assert list(secret_keys({"a": [{"b": {name: "hunter2"}}]})) == [name]
    assert list(secret_keys({name: None})) == []


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_name_is_none(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("http://u:pw@h:5000", "http"),
        ("git+https://ghp_x@github.com/x/y", "git+https"),
        ("redis://:pw@h", "redis"),
        ("hdfs://me:pw@h/r", "hdfs"),
        ('{"env_vars": {"A": "http://u:pw@h"}}', "http"),
        ("git+ssh://git@github.com/x/y", None),
        ("hdfs://me@h/r", None),
        ("gs://anonymous@bucket/r", None),
        ("https://h/a@b?mail=me@there", None),
        ("me@there: s3://bucket/runs", None),
    ],
)
def test_a_url_with_a_user_is_found_at_any_depth(text: str, scheme: str | None) -> None:
    assert url_with_user({"a": [1, {"b": text}]}) == scheme
