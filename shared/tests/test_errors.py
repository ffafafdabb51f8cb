from tenfold_shared.errors import UserError


def test_one_line_with_the_mend() -> None:
    assert str(UserError("shots is 0,\n expected 1 or more", hint="pass --shots 4")) == (
        "shots is 0, expected 1 or more; pass --shots 4"
    )
    assert str(UserError("empty file")) == "empty file"


def test_is_a_value_error_so_that_library_users_catch_it() -> None:
    assert issubclass(UserError, ValueError)
