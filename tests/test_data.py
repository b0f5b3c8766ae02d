import hashlib

import pytest

from vae_jax import DataError, load

SHA256 = {
    "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


def test_the_bundled_set_is_the_real_mnist(mnist):
    assert mnist.train_images.shape == (60000, 28, 28)
    assert mnist.test_images.shape == (10000, 28, 28)
    assert mnist.train_labels.shape == (60000,)
    assert mnist.test_labels.shape == (10000,)
    for name, array in mnist._asdict().items():
        assert array.dtype == "uint8"
        assert hashlib.sha256(array.tobytes()).hexdigest() == SHA256[name], name


def test_unknown_name():
    with pytest.raises(DataError, match="--data fashion: no such image set; the one there is: mnist"):
        load("fashion")
