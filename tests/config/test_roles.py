import pytest

from jaxgpt.config.fields import flat_fields, names_with
from jaxgpt.config.roles import Role, roles_of


@pytest.mark.parametrize("name", flat_fields())
def test_every_field_says_what_a_resumed_run_does_with_it(name):
    roles = roles_of(flat_fields()[name].type)
    assert len(roles & {Role.FIXED, Role.PINNED, Role.TUNABLE}) == 1


def test_no_role_contradicts_another():
    assert names_with(Role.SILENT) <= names_with(Role.TUNABLE)  # others cannot change
    assert names_with(Role.LOCAL) <= names_with(Role.TUNABLE)  # a run may move to other machines
    assert not names_with(Role.DERIVED) & names_with(Role.PLANNED)


def test_an_annotation_without_roles_has_none():
    assert roles_of(int) == frozenset()
