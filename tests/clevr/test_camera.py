import numpy as np

from msdspn_jax.clevr.camera import Camera, camera_ray, look_at_origin, project

# Read off a scene rendered by Blender from the generator's base scene: its jittered camera, and two
# objects with the pixel coordinates the generator computed (rounded to whole pixels).
CAMERA = {
    "location": [7.285567283630371, -6.92439603805542, 5.724620342254639],
    "matrix_world": [
        [0.6889119148254395, -0.35872939229011536, 0.6298519968986511, 7.285567283630371],
        [0.7248450517654419, 0.34094589948654175, -0.5986279845237732, -6.92439603805542],
        [0.0, 0.8689470291137695, 0.4949049651622772, 5.724620342254639],
        [0.0, 0.0, 0.0, 1.0],
    ],
}


def test_camera_projects_as_blender_does():
    camera = Camera(np.array(CAMERA["matrix_world"]))
    position = np.array([-1.9571157693862915, 2.1000497341156006, 0.3499999940395355])
    pixel = project(camera, position)
    np.testing.assert_allclose(pixel, [247, 95, 13.9], atol=0.5)
    np.testing.assert_allclose(
        project(camera, position, 128, 128), pixel * [128 / 480, 128 / 320, 1]
    )


def test_looking_at_the_origin():
    aimed = look_at_origin(CAMERA["location"])
    np.testing.assert_allclose(aimed.matrix_world, CAMERA["matrix_world"], atol=1e-6)
    distance = np.linalg.norm(CAMERA["location"])
    np.testing.assert_allclose(project(aimed, np.zeros(3)), [240, 160, distance], atol=1e-4)
    assert np.isnan(project(aimed, np.array([20.0, -20, 15]))).all()


def test_rays_meet_what_they_point_at():
    location = np.array(CAMERA["location"], np.float32)
    u, v = np.float32([10.0, 240.0, 471.5]), np.float32([300.0, 160.0, 20.25])
    ray = np.stack(camera_ray(location, u, v), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(ray, axis=-1), 1, rtol=1e-6)
    pixel = project(look_at_origin(location), location + 9 * ray)
    np.testing.assert_allclose(pixel[:, :2], np.stack([u, v], axis=-1), atol=1e-3)
