"""Object stores behind the same names as files: every path of a user may be an fsspec URL (s3://, gs://, az://, file://).

Reading is verified against the checksums that publishing wrote; publishing shows a new result as a whole or not at all.
"""

from layerlens.storage.fetch import local_copy, local_file, read_bytes, read_text
from layerlens.storage.filesystem import joined, local_or_url, redacted, shown, url_of
from layerlens.storage.publish import check_publishable, publish

__all__ = [
    "check_publishable",
    "joined",
    "local_copy",
    "local_file",
    "local_or_url",
    "publish",
    "read_bytes",
    "read_text",
    "redacted",
    "shown",
    "url_of",
]
